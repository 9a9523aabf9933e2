"""The fits of each method that has any, by its name. One method, one file."""

from __future__ import annotations

from offramp_train.fits import cats, class_means, right_tool
from offramp_train.fits.fit import Fit

FITS: dict[str, tuple[Fit, ...]] = {
    "right_tool": right_tool.FITS,
    "class_means": class_means.FITS,
    "cats": cats.FITS,
}
