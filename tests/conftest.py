"""Every test sees eight CPU devices: single-device code uses the first, sharded code all of them."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
os.environ.setdefault("TFDS_DISABLE_PROGRESS_BAR", "1")
