"""A three-hop graph as a user of Ray Serve would first write it: `serve run plain_graph:app`, with all of Serve's defaults.

The decoder and the encoder do nothing; bodies, pixels and vectors travel as in clipfleet.
"""

import numpy as np
from ray import serve
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=64)
class Decoder:
    async def decode(self, image: bytes) -> np.ndarray:
        return np.zeros((224, 224, 3), np.uint8)


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=64)
class Encoder:
    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0)
    async def encode(self, images: list[np.ndarray]) -> list[np.ndarray]:
        return [np.zeros(512, np.float32)] * len(images)


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=64)
class Ingress:
    def __init__(self, decoder, encoder):
        self.decoder, self.encoder = decoder, encoder

    async def __call__(self, request: Request) -> Response:
        pixels = await self.decoder.decode.remote(await request.body())
        vector = await self.encoder.encode.remote(pixels)
        return Response(vector.tobytes(), media_type="application/octet-stream")


app = Ingress.bind(Decoder.bind(), Encoder.bind())
