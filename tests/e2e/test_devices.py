"""The real model on eight devices: the same tokens and logits as on one, however the mesh is laid out.

SmolLM2 has 9 query and 3 kv heads, neither of which 8 (or 4, or 2) divides, so its attention is replicated where it
must be; its feed-forward layers and vocabulary are split.
"""

import json
from pathlib import Path

SCRIPT = """
import json, sys
import numpy as np
from jllm_runtime import SamplingParams, generate, load_model, make_mesh

folder, *meshes = sys.argv[1:]
results = []
for mesh in meshes:
    model = load_model(folder, make_mesh(json.loads(mesh)))
    chats = ["What is the capital of France?", "Say hello.", "Count to three.", "Name a colour."]
    prompts = [model.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in chats]
    outputs = generate(model, prompts, SamplingParams(max_tokens=6, ignore_eos=True))
    logits = np.asarray(model.logits([prompts[0]]))
    split = model.weights.layers[0].ffw.w_up.sharding.shard_shape((576, 1536))
    results.append({"tokens": [o.token_ids for o in outputs], "logits": logits[0, -4:].tolist(), "split": split})
print(json.dumps(results))
"""


def results_of(run, tmp_path: Path, folder: Path, devices: int, *meshes: dict[str, int]) -> list[dict]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = run(script, folder, *map(json.dumps, meshes), devices=devices, timeout=900)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_eight_devices_equal_one(run, smollm2_folder, tmp_path):
    (one,) = results_of(run, tmp_path, smollm2_folder, 1, {})
    meshes = [{"tensor": 8}, {"data": 4, "tensor": 2}, {"data": 2, "tensor": 4}]
    for mesh, many in zip(meshes, results_of(run, tmp_path, smollm2_folder, 8, *meshes), strict=True):
        assert many["tokens"] == one["tokens"], mesh
        assert many["split"] == [576, 1536 // mesh["tensor"]]
        differences = [
            abs(a - b) for x, y in zip(many["logits"], one["logits"], strict=True) for a, b in zip(x, y, strict=True)
        ]
        assert max(differences) < 2e-4, mesh
