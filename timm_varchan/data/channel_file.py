"""Where 0.1 had the functions for files of channels, for programs that import them from here."""

from timm_varchan.channels import read_channels, write_channels

__all__ = ["read_channels", "write_channels"]
