"""LitServe with the same model, its own batching and its documented seams: `python litserve_server.py CHECKPOINT PORT`.

Takes {"image": base64} or {"text": ...}; answers {"embedding": base64 of float32}. Images and texts are batched by two APIs of
one server, since a LitAPI's batch holds one kind.
"""

import base64
import io
import sys

import litserve as ls
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

CHECKPOINT, PORT = sys.argv[1], int(sys.argv[2])


class ClipAPI(ls.LitAPI):
    def setup(self, device):
        torch.set_num_threads(2)
        self.model = CLIPModel.from_pretrained(CHECKPOINT).eval()
        self.processor = CLIPProcessor.from_pretrained(CHECKPOINT)

    def batch(self, inputs):
        return inputs

    def unbatch(self, output):
        return list(output)

    def vectors(self, features):
        found = features if isinstance(features, torch.Tensor) else features.pooler_output
        return found / found.norm(dim=-1, keepdim=True)

    def encode_response(self, output):
        return {"embedding": base64.b64encode(output.numpy().tobytes()).decode()}


class Images(ClipAPI):
    def decode_request(self, request):
        return Image.open(io.BytesIO(base64.b64decode(request["image"]))).convert("RGB")

    def predict(self, batch):
        with torch.no_grad():
            return self.vectors(self.model.get_image_features(**self.processor(images=batch, return_tensors="pt")))


class Texts(ClipAPI):
    def decode_request(self, request):
        return request["text"]

    def predict(self, batch):
        with torch.no_grad():
            inputs = self.processor(text=batch, return_tensors="pt", padding=True, truncation=True)
            return self.vectors(self.model.get_text_features(**inputs))


if __name__ == "__main__":
    batching = {"max_batch_size": 32, "batch_timeout": 0.005}
    apis = [Images(api_path="/images", **batching), Texts(api_path="/texts", **batching)]
    server = ls.LitServer(apis, accelerator="cpu", workers_per_device=1, timeout=120)
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, num_api_servers=1)
