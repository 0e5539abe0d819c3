"""JPEG decoders over the same files, one core: `python decoders.py FILE...` prints one JSON object.

For each decoder: milliseconds an image, and how many images it decodes to Pillow's very pixels.
"""

import io
import json
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pyvips
import simplejpeg
from PIL import Image

EDGE = 224


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def pillow_resized(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    scale = EDGE / min(image.size)
    size = max(EDGE, int(image.width * scale)), max(EDGE, int(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def opencv(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def vips(data: bytes) -> np.ndarray:
    return pyvips.Image.new_from_buffer(data, "").numpy()


def main() -> None:
    cv2.setNumThreads(1)
    files = [Path(path).read_bytes() for path in sys.argv[1:]]
    decoders = {"Pillow": pillow, "simplejpeg": simplejpeg.decode_jpeg, "OpenCV": opencv, "pyvips": vips,
                "Pillow, decoded and resized": pillow_resized}  # fmt: skip
    expected = [pillow(data) for data in files]
    found = {}
    for name, decode in decoders.items():
        equal = sum(np.array_equal(decode(data), pixels) for data, pixels in zip(files, expected, strict=True))
        times = []
        for _ in range(3):
            started = time.perf_counter()
            for data in files:
                decode(data)
            times.append((time.perf_counter() - started) / len(files) * 1000)
        found[name] = {"ms": times, "equal": equal}
    print(json.dumps({"images": len(files), "decoders": found}))


if __name__ == "__main__":
    main()
