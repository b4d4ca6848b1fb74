"""A library made of C function pointers: what arrives at one of its functions went through the C ABI. Standard library only."""

import ctypes
from ctypes import CFUNCTYPE, c_int, c_void_p


class _Pointer(ctypes._CFuncPtr):
    """A function as a library gives it out: an address, with no types until somebody sets them."""

    _flags_ = ctypes._FUNCFLAG_CDECL
    _restype_ = c_int


class FakeLibrary:
    """prototypes: name of each function -> the types of its arguments, written from NVIDIA's headers and not from those of cuda/,
    which would have the same mistakes. A function `f` does what the method `_f` does; what that returns is its status, None is 0."""

    def __init__(self, prototypes):
        self.faults = []  # exceptions inside these methods, which C would swallow
        self._kept = []  # what C has addresses of
        for function, types in prototypes.items():
            callback = CFUNCTYPE(c_int, *types)(self._entry(function))
            self._kept.append(callback)
            setattr(self, function, _Pointer(ctypes.cast(callback, c_void_p).value))

    def _entry(self, function):
        def call(*arguments):
            try:
                return self._called(function, arguments) or 0
            except BaseException as error:
                self.faults.append(error)
                return 999

        return call

    def _called(self, function, arguments):
        return getattr(self, "_" + function)(*arguments)
