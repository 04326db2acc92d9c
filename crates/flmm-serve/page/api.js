// The server's interface: streamed chat, attention, and what its answers are made of.

let key = "";

/** Sends this key with every request. */
export function useKey(text) {
  key = text.trim();
}

/** An error of the server, or of the way to it, with what to do about it. */
export class ServerError extends Error {
  constructor(message, hint) {
    super(message);
    this.hint = hint;
  }
}

async function send(path, body, signal) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.", "Check that it is still running.");
  }
  if (!response.ok) {
    const told = await response.json().catch(() => ({}));
    const wait = response.headers.get("Retry-After");
    const hint = wait ? `Try again in ${wait} s.` : told.error?.hint;
    throw new ServerError(told.error?.message ?? `The server answered ${response.status}.`, hint);
  }
  return response;
}

/** The model that is served. */
export async function model() {
  return (await (await send("v1/models")).json()).data[0];
}

/**
 * Streams the answer to `messages`. `on.text` gets pieces of text, `on.phrase` annotations.
 * Returns the token counts.
 */
export async function chat(messages, options, on, signal) {
  const body = {
    messages, ...options, stream: true, stream_options: { include_usage: true }, grounding: { coarse: true },
  };
  const response = await send("v1/chat/completions", body, signal);
  let usage = null;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, chunk.error.hint);
    if (chunk.usage) usage = chunk.usage;
    const delta = chunk.choices[0]?.delta ?? {};
    if (delta.content) on.text(delta.content);
    for (const annotation of delta.annotations ?? []) on.phrase(annotation);
  }
  return usage;
}

/** Data of the server-sent events of a stream of bytes; what comes is told by its fields, whatever the event is named. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      let data = "";
      for (const line of block.split("\n")) if (line.startsWith("data:")) data += line.slice(5).trimStart();
      if (data) yield data;
    }
  }
}

/**
 * Where the tokens of the conversation's last message look, averaged over the chosen layers and heads.
 * `maps` is a list of one Float32Array per token, of `rows × columns` values; `picture` is the picture's part of a map.
 */
export async function attention(messages, layers, heads, signal) {
  const body = { messages, layers, heads, merge: "mean" };
  const file = await (await send("v1/attention", body, signal)).arrayBuffer();
  const headerLength = Number(new DataView(file).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(file, 8, headerLength)));
  const [tokens, planes, , , rows, columns] = header.attention.shape;
  // The data may not lie at a multiple of four: a copy does.
  const values = new Float32Array(file.slice(8 + headerLength + header.attention.data_offsets[0]));
  const cells = rows * columns;
  const maps = [];
  for (let token = 0; token < tokens; token += 1) {
    // The last plane is the finest.
    const from = (token * planes + planes - 1) * cells;
    maps.push(values.subarray(from, from + cells));
  }
  const told = header.__metadata__;
  return {
    maps, rows, columns, text: told.text, offsets: JSON.parse(told.offsets), picture: JSON.parse(told.picture),
  };
}
