// The page in headless Chromium, against a server that runs:
//   node page.mjs http://127.0.0.1:8080 [FOLDER for screenshots]
// CHROMIUM names the browser if it is not /usr/bin/chromium.

import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, readdirSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

import puppeteer from "puppeteer-core";

const [url, screenshots] = process.argv.slice(2);
const picture = fileURLToPath(new URL("../../../../examples/book-and-dog.png", import.meta.url));
const downloads = mkdtempSync(join(tmpdir(), "flmm-page-"));

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--force-color-profile=srgb"],
});
const page = await browser.newPage();
const complaints = [];
page.on("console", (message) => { if (message.type() === "error") complaints.push(message.text()); });
page.on("pageerror", (error) => complaints.push(String(error)));
const foreign = [];
page.on("request", (request) => {
  if (!/^(data|blob):/u.test(request.url()) && !request.url().startsWith(url)) foreign.push(request.url());
});
const session = await browser.target().createCDPSession();
await session.send("Browser.setDownloadBehavior", { behavior: "allow", downloadPath: downloads });

const shoot = async (name) => {
  if (screenshots) await page.screenshot({ path: join(screenshots, name), optimizeForSpeed: false });
};
const until = (what, ...args) => page.waitForFunction(what, { timeout: 60_000 }, ...args);
const answered = (count) => until(
  (wanted) => document.querySelectorAll(".assistant .note").length === wanted && !document.querySelector(".busy"), count,
);
/** The canvas as a list of numbers, to see whether it changes. */
const pixels = () => page.$eval("#canvas", (canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return data.reduce((sum, value, i) => (sum * 31 + value + i) % 2147483647, 7);
});
const looks = () => page.$$eval(".word", (words) => words.map((word) => [
  word.textContent, Number(word.style.getPropertyValue("--look") || 0),
]));
const ask = async (text) => {
  await page.type("#question", text);
  await page.keyboard.press("Enter");
};

await page.setViewport({ width: 960, height: 640 });
await page.goto(url, { waitUntil: "networkidle0" });
await until(() => document.querySelector("#layer").options.length > 1);
assert.equal(await page.$eval("#send", (button) => button.disabled), true);

// Upload and ask.
await (await page.$("#file")).uploadFile(picture);
await until(() => !document.querySelector("#stage").hidden);
const bare = await pixels();
await ask("Please give me a description of the image.");
await answered(1);
const phrases = await page.$$eval(".phrase", (buttons) => buttons.map((button) => button.textContent));
assert.ok(phrases.length > 1, "phrases are buttons");
const masked = await pixels();
assert.notEqual(masked, bare, "masks are drawn");
await page.mouse.move(5, 5);
await shoot("serve-answer.png");

// A phrase lights its mask, by pointer and by keyboard.
await page.hover(".phrase");
const lit = await pixels();
assert.notEqual(lit, masked, "one mask alone is shown");
await page.mouse.move(5, 5);
assert.equal(await pixels(), masked);
await page.focus(".phrase");
assert.equal(await pixels(), lit, "focus does what pointing does");
await page.evaluate(() => document.activeElement.blur());

// A place of the picture lights words and the phrases whose masks it is in.
const box = await (await page.$("#canvas")).boundingBox();
let found = false;
for (let step = 1; step < 100 && !found; step += 1) {
  const [x, y] = [(step % 10) / 10, Math.floor(step / 10) / 10 + 0.05];
  await page.mouse.move(box.x + x * box.width, box.y + Math.min(y, 0.99) * box.height);
  found = (await page.$$(".phrase.lit")).length > 0;
}
assert.ok(found, "a place inside a mask lights its phrase");
assert.ok((await looks()).some(([, level]) => level > 0.5), "words that look there light up");
assert.match(await page.$eval("#where", (line) => line.textContent), /words that look here/u);
await shoot("serve-place.png");
await page.mouse.move(5, 5);
assert.ok((await looks()).every(([, level]) => level === 0));
await page.focus("#canvas");
await page.keyboard.press("ArrowRight");
assert.ok((await looks()).some(([, level]) => level > 0.5), "arrow keys do what pointing does");
await page.keyboard.press("Escape");

// Coarse masks and attention are other pictures; a word shows where it looks.
await page.click("input[value=coarse]");
const coarse = await pixels();
assert.notEqual(coarse, masked);
await page.click("input[value=attention]");
await page.hover(".assistant .phrase .word");
const attention = await pixels();
assert.ok(attention !== bare && attention !== coarse);
await shoot("serve-attention.png");
const one = page.waitForResponse((response) => response.url().endsWith("/v1/attention"));
await page.select("#layer", "5");
assert.deepEqual(JSON.parse((await one).request().postData()).layers, [5]);
await page.select("#layer", "");
await page.click("input[value=refined]");

// A second turn knows the picture.
await ask("What is in the background?");
await answered(2);
assert.match(await page.$$eval(".note", (notes) => notes.at(-1).textContent), /known/u);

// Exports.
const saved = async (id, ending) => {
  await page.$eval("details", (details) => { details.open = true; });
  await page.click(id);
  for (let wait = 0; wait < 50; wait += 1) {
    const file = readdirSync(downloads).find((name) => name.endsWith(ending));
    if (file) return readFileSync(join(downloads, file));
    await new Promise((resolve) => { setTimeout(resolve, 100); });
  }
  throw new Error(`nothing was saved as ${ending}`);
};
await page.hover(".phrase");
const coco = JSON.parse(await saved("#export-coco", ".coco.json"));
assert.ok(coco.annotations.length > 0 && coco.annotations[0].segmentation.counts);
assert.equal(coco.images[0].width, coco.annotations[0].segmentation.size[1]);
const [task] = JSON.parse(await saved("#export-labelstudio", ".labelstudio.json"));
const { value, original_width, original_height } = task.predictions[0].result[0];
assert.equal(readBrush(value.rle).filter((bit) => bit === 255).length / 4, coco.annotations[0].area);
assert.equal(readBrush(value.rle).length, original_width * original_height * 4);
assert.equal((await saved("#export-png", ".overlay.png")).subarray(1, 4).toString(), "PNG");

// Errors are shown, and the question is not lost.
await ask("<image>");
await until(() => !document.querySelector("#error").hidden);
assert.match(await page.$eval("#error", (box) => box.textContent), /image/u);
assert.equal(await page.$eval("#question", (box) => box.value), "<image>");
await shoot("serve-error.png");
await page.$eval("#question", (box) => { box.value = ""; });

// What is no picture is refused.
await (await page.$("#file")).uploadFile(fileURLToPath(import.meta.url));
await until(() => document.querySelector("#error").textContent.includes("not a picture"));

// An answer can be stopped, and the conversation goes on from before it.
await page.evaluate(() => {
  document.querySelector("#question").value = "Please give me a description of the image.";
  document.querySelector("#form").requestSubmit();
  document.querySelector("#stop").click();
});
await until(() => [...document.querySelectorAll(".assistant")].at(-1).textContent.includes("(stopped)"));
await ask("What is in the picture?");
await answered(3);

// Dark, and as wide as a phone (which loads the page anew): nothing sticks out.
await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: "dark" }]);
await page.setViewport({ width: 390, height: 844, isMobile: true, hasTouch: true });
await until(() => document.querySelector("#layer").options.length > 1);
await (await page.$("#file")).uploadFile(picture);
await until(() => !document.querySelector("#stage").hidden);
await ask("What is in the picture?");
await answered(1);
await page.tap("#canvas");
assert.ok((await looks()).some(([, level]) => level > 0.5), "a tap does what pointing does");
const wide = await page.evaluate(() => document.documentElement.scrollWidth);
assert.ok(wide <= 390, `the page is ${wide} pixels wide`);
await shoot("serve-phone.png");

assert.deepEqual(foreign, [], "the page asks for nothing outside the server");
// The browser itself reports the status of the request that was meant to fail.
assert.deepEqual(complaints.filter((text) => !text.includes("400 (Bad Request)")), []);
await browser.close();
console.log("all passed");

/** Values of Label Studio's run lengths. */
function readBrush(bytes) {
  let at = 0;
  const take = (size) => {
    let value = 0;
    for (let i = 0; i < size; i += 1) {
      value = value * 2 + ((bytes[at >> 3] >> (7 - (at & 7))) & 1);
      at += 1;
    }
    return value;
  };
  const count = take(32);
  const size = take(5) + 1;
  const lengths = [take(4) + 1, take(4) + 1, take(4) + 1, take(4) + 1];
  const values = [];
  while (values.length < count) {
    const series = take(1);
    const length = take(lengths[take(2)]) + 1;
    if (series) {
      const value = take(size);
      for (let i = 0; i < length; i += 1) values.push(value);
    } else {
      for (let i = 0; i < length; i += 1) values.push(take(size));
    }
  }
  return values;
}
