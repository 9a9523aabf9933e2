"""The cloud tier: an engine that finishes deep layers, a gateway in front of it, and the Ray Serve
application that places and replaces its replicas."""
