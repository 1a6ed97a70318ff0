"""The aggregation core beside numpy, scipy, Flower and ByzFL, in one run; see `__main__.py`."""
