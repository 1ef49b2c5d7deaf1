// The page: what is asked for, the answers, the history.
import { AnswerView, MODES, ask, make, read } from "/answer.js";

const $ = (id) => document.getElementById(id);
const RATIOS = { auto: "as the reference, else square", "1:1": "1:1", "4:3": "4:3", "3:4": "3:4", "16:9": "16:9", "9:16": "9:16" };
const STORE = "ivr_jax.history", LONGEST = 100;
const NUMBERS = ["seed", "max_images", "max_tokens"];
let server = { models: [] };
let references = []; // names of uploaded images
let views = [];

function complain(error) {
  $("alert").textContent = error ? (error.message ?? error) : "";
  $("alert").hidden = !error;
}

// -- the request --

function fill(select, options, chosen) {
  select.replaceChildren(...Object.entries(options).map(([value, text]) => new Option(text, value, value === chosen, value === chosen)));
}

function modelOf(name) {
  return server.models.find((model) => model.name === name) ?? server.models[0];
}

function showModes() {
  const { modes, examples } = modelOf($("model").value);
  const before = document.querySelector("input[name=mode]:checked")?.value;
  const chosen = modes.includes(before) ? before : modes[0];
  $("modes").replaceChildren(...modes.map((mode) => {
    const label = make("label", "", MODES[mode] ?? mode);
    const input = make("input");
    Object.assign(input, { type: "radio", name: "mode", value: mode, checked: mode === chosen });
    label.prepend(input);
    return label;
  }));
  $("examples").replaceChildren(...examples.map((text) => {
    const button = make("button", "", text);
    button.type = "button";
    button.addEventListener("click", () => { $("prompt").value = text; $("prompt").focus(); });
    return button;
  }));
  fill($("mode2"), Object.fromEntries(modelOf($("model2").value).modes.map((mode) => [mode, MODES[mode] ?? mode])), $("mode2").value);
}

function setMode(mode) {
  const input = document.querySelector(`input[name=mode][value="${CSS.escape(mode)}"]`);
  if (input) input.checked = true;
}

function wanted() {
  const request = { prompt: $("prompt").value, references: [...references], model: $("model").value, mode: document.querySelector("input[name=mode]:checked").value };
  for (const id of NUMBERS) request[id] = Number($(id).value || 0);
  return { ...request, aspect_ratio: $("aspect_ratio").value, temperature: Number($("temperature").value), guidance: Number($("guidance").value) };
}

function newSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] % 1000000;
}

async function draw() {
  complain();
  if ($("new-seed").checked) {
    $("seed").value = newSeed();
    $("seed2").value = newSeed();
  }
  const first = wanted();
  const requests = [first];
  if ($("compare").checked) requests.push({ ...first, model: $("model2").value, mode: $("mode2").value, seed: Number($("seed2").value || 0) });
  await start(requests);
}

async function start(requests) {
  $("draw").disabled = true;
  try {
    await Promise.all(views.map((view) => view.stop()));
    const ids = await Promise.all(requests.map(async (request) => (await ask("/api/answers", request)).id));
    show(requests.map((request, i) => {
      const view = new AnswerView(request, act);
      view.follow(ids[i]);
      return view;
    }));
    remember(ids, requests[0].prompt);
    window.history.pushState({}, "", `/a/${ids.join("+")}`);
  } catch (error) {
    complain(error);
  } finally {
    $("draw").disabled = false;
  }
}

function show(next) {
  views.forEach((view) => view.close());
  views = next;
  $("answers").replaceChildren(...views.map((view) => view.box));
}

const act = {
  complain,
  upload,
  over() {
    showHistory();
  },
  async useAsReference(uri) {
    try {
      await addReference(await blobOf(uri));
      $("prompt").focus();
    } catch (error) { complain(error); }
  },
  async go(view, request) {
    complain();
    try {
      const { id } = await ask("/api/answers", request);
      const { continue: _, ...plain } = request;
      const next = new AnswerView(plain, act);
      views = views.map((other) => (other === view ? next : other));
      view.box.replaceWith(next.box);
      next.follow(id);
      const ids = views.map((other) => other.id);
      remember(ids, plain.prompt);
      window.history.pushState({}, "", `/a/${ids.join("+")}`);
    } catch (error) { complain(error); }
  },
};

// -- references --

async function blobOf(uri) {
  if (!uri.startsWith("data:")) return (await fetch(uri)).blob();
  const bytes = Uint8Array.from(atob(uri.split(",")[1]), (letter) => letter.charCodeAt(0)); // the policy forbids to fetch it
  return new Blob([bytes], { type: "image/png" });
}

async function upload(file) {
  const limit = server.limits.upload_bytes;
  if (file.size > limit) throw new Error(`The image is larger than ${limit >> 20} MB. Scale it down.`);
  return read(await fetch("/api/images", { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file }).catch(() => null));
}

async function addReference(file) {
  if (references.length >= server.limits.references) throw new Error(`At most ${server.limits.references} references are taken.`);
  references.push((await upload(file)).name);
  showReferences();
}

async function addFiles(files) {
  complain();
  for (const file of files) await addReference(file).catch(complain);
}

function showReferences() {
  $("references").replaceChildren(...references.map((name, index) => {
    const item = make("li");
    const image = make("img");
    image.src = `/api/images/${name}`;
    image.alt = `Reference ${index + 1}`;
    const remove = make("button", "", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove reference ${index + 1}`);
    remove.addEventListener("click", () => { references.splice(index, 1); showReferences(); });
    item.append(image, make("span", "place", String(index + 1)), remove);
    return item;
  }));
}

// -- history: ids and prompts in this browser; the answers are on the server --

function entries() {
  try {
    return JSON.parse(localStorage.getItem(STORE)) ?? [];
  } catch {
    return [];
  }
}

function remember(ids, prompt) {
  const all = [{ ids, prompt, when: Date.now() }, ...entries()].slice(0, LONGEST);
  localStorage.setItem(STORE, JSON.stringify(all));
  showHistory();
}

function showHistory() {
  const all = entries();
  $("no-history").hidden = all.length > 0;
  $("clear-history").hidden = all.length === 0;
  if ($("history").hidden) return;
  $("entries").replaceChildren(...all.map(({ ids, prompt, when }) => {
    const item = make("li"), button = make("button"), words = make("span", "words");
    button.type = "button";
    const image = make("img");
    image.alt = "";
    image.loading = "lazy";
    image.addEventListener("error", () => image.replaceWith(make("span", "none")));
    image.src = `/api/answers/${ids[0]}/files/final.png`;
    words.append(make("span", "what", prompt), make("span", "when", new Date(when).toLocaleString() + (ids.length > 1 ? " · side by side" : "")));
    button.append(image, words);
    button.addEventListener("click", async () => {
      window.history.pushState({}, "", `/a/${ids.join("+")}`);
      await open();
    });
    item.append(button);
    return item;
  }));
}

function toggleHistory(open = $("history").hidden) {
  $("history").hidden = !open;
  $("history-button").setAttribute("aria-expanded", String(open));
  showHistory();
}

async function open() {
  const address = location.pathname;
  complain();
  const ids = location.pathname.startsWith("/a/") ? location.pathname.slice(3).split("+").filter(Boolean).slice(0, 2) : [];
  if (!ids.length) return show([]);
  try {
    const opened = [];
    for (const id of ids) {
      const record = await ask(`/api/answers/${encodeURIComponent(id)}`);
      if (location.pathname !== address) return; // by now another answer is open
      const view = new AnswerView(record.request, act);
      if (record.running) view.follow(id);
      else view.show(id, record);
      opened.push(view);
    }
    show(opened);
    const { request } = opened[0];
    $("prompt").value = request.prompt;
    $("seed").value = request.seed;
    setMode(request.mode);
  } catch (error) {
    if (location.pathname !== address) return;
    show([]);
    complain(error);
  }
}

// -- wiring --

$("composer").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
$("files").addEventListener("change", async () => { await addFiles([...$("files").files]); $("files").value = ""; });
$("compare").addEventListener("change", () => { $("second").hidden = !$("compare").checked; });
$("model").addEventListener("change", showModes);
$("model2").addEventListener("change", showModes);
$("history-button").addEventListener("click", () => toggleHistory());
$("clear-history").addEventListener("click", () => { localStorage.removeItem(STORE); showHistory(); $("entries").replaceChildren(); });
$("help-button").addEventListener("click", () => $("help").showModal());
$("help-close").addEventListener("click", () => $("help").close());
window.addEventListener("popstate", open);
window.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) { event.preventDefault(); addFiles(files); }
});
window.addEventListener("dragover", (event) => { event.preventDefault(); $("composer").classList.add("drop"); });
window.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("composer").classList.remove("drop"); });
window.addEventListener("drop", (event) => { event.preventDefault(); $("composer").classList.remove("drop"); addFiles([...event.dataTransfer.files]); });
window.addEventListener("keydown", (event) => {
  const writing = event.target.matches?.("input:not([type=radio]):not([type=checkbox]), textarea, select");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.form !== null && !event.target.closest?.(".edit")) { event.preventDefault(); draw(); }
  else if (event.key === "Escape" && !$("help").open) {
    if (!$("history").hidden) toggleHistory(false);
    else views.forEach((view) => view.stop());
  } else if (writing || event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  else if (event.key === "/") { event.preventDefault(); $("prompt").focus(); }
  else if (event.key === "h" || event.key === "H") toggleHistory();
  else if (event.key === "?") $("help").showModal();
});

fill($("aspect_ratio"), RATIOS, "auto");
fill($("temperature"), Object.fromEntries([0, 0.3, 0.5, 0.7, 1].map((t) => [String(t), t === 0 ? "0 (likeliest)" : String(t)])), "1");
fill($("guidance"), Object.fromEntries([1, 1.5, 2, 3, 5].map((g) => [String(g), g === 1 ? "1 (off)" : String(g)])), "1");
try {
  server = await ask("/api/server");
  const names = Object.fromEntries(server.models.map((model) => [model.name, model.name]));
  fill($("model"), names, server.models[0].name);
  fill($("model2"), names, server.models[0].name);
  $("model-field").hidden = $("model2-field").hidden = server.models.length < 2;
  $("served").textContent = server.models.map((model) => model.name).join(", ");
  showModes();
  document.body.dataset.ready = "true";
  await open();
} catch (error) {
  complain(error);
}
