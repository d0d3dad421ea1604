"""`peft_layers` for bitsandbytes' bases; apart, since PEFT's classes of them can be imported only where it is installed."""

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from .peft_layers import _Accelerated


class AcceleratedLinear8bitLt(_Accelerated, Linear8bitLt):
    __doc__ = _Accelerated.forward.__doc__


class AcceleratedLinear4bit(_Accelerated, Linear4bit):
    __doc__ = _Accelerated.forward.__doc__


CLASSES = {Linear8bitLt: AcceleratedLinear8bitLt, Linear4bit: AcceleratedLinear4bit}
