"""On PYTHONPATH, gives Pillow a fatal fault: a JPEG with the comment below ends the process that decodes it."""

import os
import signal

from PIL import JpegImagePlugin

COMMENT = b"clipfleet: end this process"
_load = JpegImagePlugin.JpegImageFile.load


def load(self: JpegImagePlugin.JpegImageFile) -> object:
    if self.info.get("comment") == COMMENT:
        os.kill(os.getpid(), signal.SIGKILL)
    return _load(self)


JpegImagePlugin.JpegImageFile.load = load  # type: ignore[method-assign]
