"""The official Python client, unmodified, against a server that runs: python client.py http://127.0.0.1:8080 [KEY]"""

import base64
import pathlib
import sys

import openai

ROOT = pathlib.Path(__file__).resolve().parents[4]
PICTURE = base64.b64encode((ROOT / "examples/scene.png").read_bytes()).decode()


def question(text):
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}
    return {"role": "user", "content": [image, {"type": "text", "text": text}]}


def main(url, key="none"):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    model = client.models.list().data[0].id
    first = question("Please give me a description of the image.")
    ask = client.chat.completions.create

    whole = ask(model=model, messages=[first])
    message = whole.choices[0].message
    assert message.content and whole.usage.completion_tokens > 0
    assert message.annotations, "no phrase was grounded"
    for phrase in message.annotations:
        assert phrase.type == "grounding"
        assert message.content[phrase.start : phrase.end] == phrase.phrase
        assert set(phrase.segmentation) == {"size", "counts"} and len(phrase.bbox) == 4
    print("answer:", message.content)
    print("phrases:", [phrase.phrase for phrase in message.annotations])

    # The text is the same without grounding, streamed or not.
    plain = ask(model=model, messages=[first], extra_body={"grounding": False})
    assert plain.choices[0].message.content == message.content and not plain.choices[0].message.annotations
    text, told, usage = "", [], None
    for chunk in ask(model=model, messages=[first], stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            told += getattr(choice.delta, "annotations", None) or []
    assert text == message.content and usage.completion_tokens == whole.usage.completion_tokens
    assert [phrase["phrase"] for phrase in told] == [phrase.phrase for phrase in message.annotations]

    # The helper that gathers a stream does so with annotations in it.
    with client.chat.completions.stream(model=model, messages=[first]) as stream:
        gathered = stream.get_final_completion().choices[0].message
    assert gathered.content == message.content and len(gathered.annotations) == len(told)

    turns = [first, {"role": "assistant", "content": message.content}, {"role": "user", "content": "What is in the background?"}]
    second = ask(model=model, messages=turns, temperature=0.7, top_p=0.9, seed=5, max_tokens=20, stop=["zzz"])
    assert second.choices[0].message.content and second.usage.prompt_tokens_details.cached_tokens > 0
    print("second answer:", second.choices[0].message.content)

    try:
        ask(model=model, messages=[{"role": "user", "content": "no picture"}])
        raise AssertionError("a conversation without picture was answered")
    except openai.BadRequestError as error:
        assert error.code == "no_image"
    print("all passed")


main(*sys.argv[1:])
