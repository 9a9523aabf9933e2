"""What every tier of offramp knows: the one type that flows, its bytes, the bundle and the errors.

Needs numpy, msgpack, protobuf and safetensors; never torch, transformers, onnxruntime or ray.
"""

__version__ = "0.1.0"
