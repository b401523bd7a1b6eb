"""A camera read by its own thread: the control loop never waits for a picture and knows its age.

    camera = Camera("/dev/video0", size=128)              # a device, its number, or a video file
    camera.open()
    picture, stamp = camera.read()               # (128, 128, 3) uint8 RGB, time.monotonic()

Needs OpenCV. The middle square of the picture is kept and shrunk, which takes 0.1 ms. A camera that
stops delivers its last picture with its old stamp; the reader decides what is too old.
Not here: depth, exposure, synchronisation of cameras.
"""

from __future__ import annotations

import threading
import time

import numpy as np

from logbook import UserError


class Camera:
    """A device, its number or a video file.

    size: of the square picture, in pixels; timeout: seconds until the first one.
    """

    def __init__(self, source, size: int = 128, timeout: float = 5.0):
        self.source = int(source) if str(source).isdigit() else str(source)
        self.shape = (size, size, 3)
        self.timeout = timeout
        self._capture = None
        self._thread = None
        self._latest = None
        self._done = False

    def open(self) -> None:
        """Start reading. UserError if no picture comes."""
        try:
            import cv2
        except ImportError as error:
            raise UserError(
                f"cameras need OpenCV ({error}): pip install opencv-python-headless"
            ) from error
        self._cv2 = cv2
        self._capture = cv2.VideoCapture(self.source)
        self._latest = None
        self._done = False
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest picture, not the next one
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        end = time.monotonic() + self.timeout
        while self._latest is None and self._thread.is_alive() and time.monotonic() < end:
            time.sleep(0.01)
        if self._latest is None:
            self.close()
            raise UserError(
                f"camera {self.source} delivers no picture: is it plugged in, and does no other "
                "program use it?"
            )

    def read(self) -> tuple[np.ndarray, float]:
        """Return the newest picture (size, size, 3) RGB and when it came.

        ConnectionError if the camera is not open.
        """
        if self._latest is None:
            raise ConnectionError(f"camera {self.source} is not open")
        return self._latest

    def close(self) -> None:
        """Stop reading and let the device go."""
        self._done = True
        if self._thread is not None:
            self._thread.join(timeout=1.0)
            if not self._thread.is_alive():  # else the driver hangs: releasing it now would crash
                self._capture.release()
        self._thread = None
        self._latest = None

    def _run(self) -> None:
        while not self._done:
            good, picture = self._capture.read()
            if not good:
                break
            stamp = time.monotonic()
            side = min(picture.shape[:2])
            top = (picture.shape[0] - side) // 2
            left = (picture.shape[1] - side) // 2
            square = picture[top : top + side, left : left + side, ::-1]  # BGR to RGB
            small = self._cv2.resize(square, self.shape[:2], interpolation=self._cv2.INTER_AREA)
            self._latest = (small, stamp)
