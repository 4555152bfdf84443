from jaxkv.models import load
from jaxkv.serving import Request, ServingConfig, serve

loaded = load("smollm2-135m")
sizes = loaded.model.cache_config(num_pages=256, max_seqs=8, max_pages_per_seq=64, prefix_cache=True)
questions = "Why is the sky blue?", "What is the capital of France?"
prompts = [loaded.tokenizer.encode_chat([{"role": "user", "content": question}]) for question in questions]
requests = (Request(tokens=p, max_new_tokens=32, stop_tokens=loaded.tokenizer.stop_tokens) for p in prompts)
for event in serve(loaded.model, ServingConfig(sizes), requests, tokenizer=loaded.tokenizer):
    print(event.id, event.error or repr(event.text), event.finish.name)
