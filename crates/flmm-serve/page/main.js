// The page: a picture, a conversation about it, and what words and places have to do with one another.

import * as api from "./api.js";
import { coco, json, labelStudio, save } from "./export.js";
import { cellAt, mean, relative, tokensOf } from "./masks.js";
import { Stage, turn, write } from "./view.js";

const at = (id) => document.getElementById(id);
const stage = new Stage(at("canvas"));

/** The picture, the turns so far (`{question, answer, element}`), the answer that is shown, and what is pointed at. */
const state = { picture: null, turns: [], shown: null, lit: null, pinned: null, heat: null, point: null, running: null };

const setting = (name) => document.querySelector(`input[name=${name}]:checked`).value;

function draw() {
  const view = setting("view");
  const opacity = at("opacity").value / 100;
  const { shown, point } = state;
  const lit = state.lit ?? state.pinned;
  if (!shown) return stage.draw({ point });
  if (view === "attention") {
    const heat = state.heat ?? phraseHeat(lit);
    if (!point) at("where").textContent = heat ? "" : "Point at a word to see where it looks.";
    return stage.draw({ heat, opacity, point });
  }
  const masks = shown.annotations.map((annotation, index) => ({
    mask: view === "coarse" ? annotation.coarse : annotation.segmentation,
    index,
    strength: lit === null ? 0.75 : Number(lit === index),
  }));
  stage.draw({ masks, opacity, point });
}

/** Where a phrase looks. */
function phraseHeat(number) {
  const { attention, annotations } = state.shown;
  if (!attention || number === null || !annotations[number]) return null;
  return heatOf(state.shown, annotations[number].start, annotations[number].end);
}

/** Where the characters `start..end` of an answer look. */
function heatOf({ attention, relative: maps }, start, end) {
  const tokens = attention ? tokensOf(attention.offsets, start, end) : [];
  return tokens.length ? { map: mean(tokens.map((token) => maps[token])), attention } : null;
}

/** Marks phrases and words of the shown answer: those that the place `x`, `y` belongs to, or none. */
function explore(x, y) {
  const { shown } = state;
  state.point = x === undefined ? null : { x, y };
  const view = setting("view");
  const inside = new Set();
  if (shown && state.point) {
    shown.annotations.forEach((annotation, number) => {
      const mask = view === "coarse" ? annotation.coarse : annotation.segmentation;
      if (stage.covers(mask, x, y)) inside.add(number);
    });
  }
  for (const { answer } of state.turns) {
    if (!answer) continue;
    for (const button of answer.element.querySelectorAll(".phrase")) {
      button.classList.toggle("lit", answer === shown && inside.has(Number(button.dataset.number)));
    }
    for (const word of answer.element.querySelectorAll(".word")) word.style.removeProperty("--look");
  }
  const told = [...inside].map((number) => shown.annotations[number].phrase);
  if (shown?.attention && state.point) {
    const cell = cellAt(shown.attention, x, y);
    const words = [...shown.element.querySelectorAll(".word")].map((word) => {
      const tokens = tokensOf(shown.attention.offsets, Number(word.dataset.start), Number(word.dataset.end));
      return { word, level: Math.max(0, ...tokens.map((token) => shown.relative[token][cell])) };
    });
    const most = Math.max(...words.map(({ level }) => level), 1e-9);
    for (const { word, level } of words) word.style.setProperty("--look", ((level / most) ** 2).toFixed(3));
    const spoken = words.filter(({ word }) => /\p{L}|\p{N}/u.test(word.textContent));
    const best = spoken.sort((a, b) => b.level - a.level).slice(0, 3);
    told.push(`words that look here: ${best.map(({ word }) => word.textContent).join(", ")}`);
  }
  at("where").textContent = told.join("; ");
  draw();
}

/** What the words of an answer do when they are pointed at. */
function pointing(answer) {
  const light = (change) => {
    Object.assign(state, { shown: answer, point: null }, change);
    draw();
  };
  return {
    word: (start, end) => light({ heat: heatOf(answer, start, end) }),
    phrase: (number) => light({ lit: number, heat: null }),
    pin: (number) => {
      const pinned = state.pinned === number && state.shown === answer ? null : number;
      for (const button of document.querySelectorAll(".phrase")) button.setAttribute("aria-pressed", "false");
      const button = answer.element.querySelector(`.phrase[data-number="${number}"]`);
      button?.setAttribute("aria-pressed", String(pinned !== null));
      light({ pinned, lit: null });
    },
    leave: () => light({ lit: null, heat: null }),
  };
}

function fail(error) {
  const box = at("error");
  box.hidden = !error;
  box.textContent = error ? [error.message, error.hint].filter(Boolean).join("\n") : "";
}

async function take(file) {
  fail(null);
  let bitmap;
  try {
    // As the model sees it: orientation that a camera has noted is not applied.
    bitmap = await createImageBitmap(file, { imageOrientation: "none" });
  } catch {
    return fail(new api.ServerError(`“${file.name}” is not a picture that can be shown.`, "Try a PNG or JPEG file."));
  }
  stop();
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  state.picture = { name: file.name || "picture.png", url, bitmap, width: bitmap.width, height: bitmap.height };
  Object.assign(state, { turns: [], shown: null, lit: null, pinned: null, heat: null, point: null });
  at("log").replaceChildren();
  at("where").textContent = "";
  at("drop").hidden = true;
  at("stage").hidden = false;
  at("tools").hidden = false;
  for (const id of ["question", "send"]) at(id).disabled = false;
  exportable(false);
  stage.show(state.picture);
  draw();
  at("question").focus();
}

/** The conversation as the server wants it. */
function messages(turns) {
  return turns.flatMap(({ question, answer }, number) => {
    const image = { type: "image_url", image_url: { url: state.picture.url } };
    const text = { type: "text", text: question };
    const asked = { role: "user", content: number === 0 ? [image, text] : [text] };
    return answer ? [asked, { role: "assistant", content: answer.text }] : [asked];
  });
}

async function ask(question) {
  const asked = { question, answer: null };
  const conversation = [...state.turns, asked];
  const said = turn(at("log"), "user", question);
  const element = turn(at("log"), "assistant busy", "");
  // Screen readers wait until the answer is whole.
  element.setAttribute("aria-busy", "true");
  const answer = { text: "", annotations: [], element, attention: null, relative: null, model: at("model").textContent };
  const running = new AbortController();
  state.running = running;
  busy(true);
  const show = () => write(element, answer, pointing(answer));
  try {
    const options = { temperature: Number(at("temperature").value), max_tokens: Number(at("tokens").value) };
    const usage = await api.chat(messages(conversation), options, {
      text: (text) => { answer.text += text; show(); },
      phrase: (annotation) => {
        answer.annotations.push(annotation);
        state.shown = answer;
        show();
        draw();
      },
    }, running.signal);
    const note = document.createElement("span");
    note.className = "note";
    const known = usage?.prompt_tokens_details.cached_tokens ? `, ${usage.prompt_tokens_details.cached_tokens} known` : "";
    note.textContent = usage ? `${usage.prompt_tokens} tokens read${known}, ${usage.completion_tokens} written` : "";
    if (!answer.text) note.textContent = "The model said nothing.";
    element.append(note);
    asked.answer = answer;
    state.turns = conversation;
    state.shown = answer;
    exportable(true);
    await look(answer, running.signal);
  } catch (error) {
    if (!asked.answer) {
      if (error.name !== "AbortError") {
        said.remove();
        element.remove();
        at("question").value ||= question;
      } else {
        element.append(" (stopped)");
      }
    }
    if (error.name !== "AbortError") fail(error);
  } finally {
    if (state.running === running) state.running = null;
    element.classList.remove("busy");
    element.removeAttribute("aria-busy");
    busy(false);
    draw();
  }
}

/** Asks where the tokens of an answer look, for the chosen layer and head. */
async function look(answer, signal) {
  const turns = state.turns.slice(0, state.turns.findIndex((one) => one.answer === answer) + 1);
  if (!answer.text.trim() || !turns.length) return;
  const chosen = (id) => (at(id).value === "" ? [] : [Number(at(id).value)]);
  answer.attention = await api.attention(messages(turns), chosen("layer"), chosen("head"), signal);
  answer.relative = relative(answer.attention);
  draw();
}

function busy(on) {
  at("send").hidden = on;
  at("stop").hidden = !on;
  at("question").disabled = on || !state.picture;
  if (!on && state.picture) at("question").focus();
}

function stop() {
  state.running?.abort();
}

function exportable(on) {
  for (const id of ["export-png", "export-coco", "export-labelstudio"]) at(id).disabled = !on;
}

function exportShown(kind) {
  const answer = state.shown;
  if (!answer) return;
  const name = state.picture.name.replace(/\.[^.]*$/u, "");
  if (kind === "coco") save(json(coco(state.picture, answer)), `${name}.coco.json`);
  if (kind === "labelstudio") save(json(labelStudio(state.picture, answer)), `${name}.labelstudio.json`);
  if (kind === "png") at("canvas").toBlob((blob) => save(blob, `${name}.overlay.png`), "image/png");
}

async function greet() {
  try {
    const model = await api.model();
    at("model").textContent = model.id;
    for (const [id, count] of [["layer", model.layers], ["head", model.heads]]) {
      const options = Array.from({ length: count }, (_, number) => new Option(String(number), String(number)));
      at(id).replaceChildren(new Option("all", ""), ...options);
    }
    fail(null);
  } catch (error) {
    at("model").textContent = "not connected";
    fail(error);
  }
}

at("file").addEventListener("change", ({ target }) => { if (target.files[0]) take(target.files[0]); });
at("other").addEventListener("click", () => at("file").click());
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", ({ clipboardData }) => {
  const file = [...clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) take(file);
});

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question || !state.picture || state.running) return;
  at("question").value = "";
  fail(null);
  ask(question);
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});
at("stop").addEventListener("click", stop);

at("opacity").addEventListener("input", draw);
for (const input of document.querySelectorAll("input[name=view]")) {
  input.addEventListener("input", () => {
    at("where").textContent = "";
    draw();
  });
}
for (const id of ["layer", "head"]) {
  at(id).addEventListener("change", () => { if (state.shown) look(state.shown).catch(fail); });
}
at("key").addEventListener("change", ({ target }) => { api.useKey(target.value); greet(); });
for (const kind of ["png", "coco", "labelstudio"]) at(`export-${kind}`).addEventListener("click", () => exportShown(kind));

const canvas = at("canvas");
/** Whether a click holds the place that is shown, until the next one. */
let held = false;
function exploreAt(event) {
  const box = canvas.getBoundingClientRect();
  explore((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
}
canvas.addEventListener("pointermove", (event) => { if (!held) exploreAt(event); });
canvas.addEventListener("pointerleave", (event) => { if (!held && event.pointerType !== "touch") explore(); });
canvas.addEventListener("click", (event) => {
  held = !held || event.pointerType === "touch";
  exploreAt(event);
});
canvas.addEventListener("keydown", (event) => {
  held = false;
  const step = { ArrowLeft: [-0.03, 0], ArrowRight: [0.03, 0], ArrowUp: [0, -0.03], ArrowDown: [0, 0.03] }[event.key];
  if (event.key === "Escape") explore();
  if (!step) return;
  event.preventDefault();
  const { x, y } = state.point ?? { x: 0.5, y: 0.5 };
  const inside = (share) => Math.min(0.999, Math.max(0, share));
  explore(inside(x + step[0]), inside(y + step[1]));
});

greet();
