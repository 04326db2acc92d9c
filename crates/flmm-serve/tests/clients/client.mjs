// The official JavaScript client, unmodified, against a server that runs: node client.mjs http://127.0.0.1:8080 [KEY]

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

import OpenAI from "openai";

const [url, apiKey = "none"] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const picture = readFileSync(new URL("../../../../examples/scene.png", import.meta.url)).toString("base64");
const image = { type: "image_url", image_url: { url: `data:image/png;base64,${picture}` } };
const text = { type: "text", text: "Please give me a description of the image." };
const messages = [{ role: "user", content: [image, text] }];

const model = (await client.models.list()).data[0].id;
const whole = await client.chat.completions.create({ model, messages });
const { content, annotations } = whole.choices[0].message;
assert.ok(content && annotations.length > 0);
for (const { type, phrase, start, end, segmentation } of annotations) {
  assert.equal(type, "grounding");
  assert.equal(Array.from(content).slice(start, end).join(""), phrase);
  assert.ok(segmentation.counts);
}
console.log("answer:", content);
console.log("phrases:", annotations.map(({ phrase }) => phrase));

const plain = await client.chat.completions.create({ model, messages, grounding: false });
assert.equal(plain.choices[0].message.content, content);

let streamed = "";
const told = [];
let usage = null;
const options = { model, messages, stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create(options)) {
  usage = chunk.usage ?? usage;
  streamed += chunk.choices[0]?.delta.content ?? "";
  told.push(...(chunk.choices[0]?.delta.annotations ?? []));
}
assert.equal(streamed, content);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
assert.deepEqual(told, annotations);

// The helper that gathers a stream reads the text unchanged.
const gathered = await client.chat.completions.stream({ model, messages }).finalChatCompletion();
assert.equal(gathered.choices[0].message.content, content);

await assert.rejects(
  client.chat.completions.create({ model, messages: [{ role: "user", content: "no picture" }] }),
  (error) => error.status === 400 && error.code === "no_image",
);
console.log("all passed");
