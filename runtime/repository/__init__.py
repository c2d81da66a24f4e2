"""Model repositories for the servers that people run: Triton, OpenVINO Model Server, KServe and Ray Serve."""

__all__: list[str] = []
