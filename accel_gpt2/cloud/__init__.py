"""Rented machines: what they cost today, and the engines that start them."""
