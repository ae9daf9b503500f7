"""Which versions of the libraries that matter are installed; asked without importing them."""

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "peft",
    "bitsandbytes",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "scikit-learn",
    "matplotlib",
)


def installed_versions() -> dict[str, str | None]:
    """Name -> version, None where a package is not installed."""
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version  # a tenth of a second

    try:
        return version(package)
    except PackageNotFoundError:
        return None
