// The review page. Texts of models and people are only ever put in place as text (textContent), never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const MODES = { direct: "direct", reflection: "reflection", multi_step: "multi-step" };
const SMALL = 256; // images up to this many pixels a side are enlarged without smoothing
const state = { samples: 0, verdicts: [], latest: null, position: -1, sample: null, busy: false };
const drafts = new Map(); // position -> a comment that no verdict has kept yet
const known = new Map(); // position -> promise of a sample, for the neighbours that are fetched ahead

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(path, { ...options, cache: "no-store" });
  } catch {
    throw new Error("The review server does not answer. Start the command again, and open the address it prints.");
  }
  const value = await answer.json().catch(() => ({ error: `The server answered ${answer.status}.` }));
  if (!answer.ok) throw new Error(value.error);
  return value;
}

function complain(message) {
  $("alert").textContent = message;
  $("alert").hidden = !message;
}

// -- what is shown --

function pictureOf(image, className) {
  const picture = make("img", className);
  picture.src = `image/${encodeURIComponent(image.name)}`;
  picture.alt = "";
  picture.classList.toggle("pixels", Math.max(image.width, image.height) <= SMALL);
  return picture;
}

function views(sample) {
  const many = sample.sources.length > 1;
  const rows = sample.sources.map((image, i) => ({ label: many ? `Source ${i + 1}` : "Source", image, said: [], source: true }));
  let steps = 0, reflections = 0;
  for (const round of sample.rounds) {
    const label = round.kind === "first" ? "First image" : round.kind === "step" ? `Step ${++steps}` : `After reflection ${++reflections}`;
    rows.push({ ...round, label });
  }
  rows[rows.length - 1].final = true;
  return rows;
}

function axes(evaluation, title) {
  const rows = title ? [make("span", "title", title)] : [];
  for (const { axis, passed, score, reason } of evaluation) {
    const kind = passed ? "pass" : "fail";
    rows.push(make("span", kind, axis), make("span", `mark ${kind}`, `${passed ? "✓" : "✗"}${score === null ? "" : ` ${score}`}`),
      make("span", `reason ${kind}`, reason));
    rows[rows.length - 1].dir = "auto";
  }
  return rows;
}

function card(view, index) {
  const box = make("article", view.final ? "card final" : "card");
  const head = make("div", "head");
  head.append(make("span", "", view.label), make("span", "number", `${index + 1}`));
  if (view.evaluation) {
    const passed = view.evaluation.every((axis) => axis.passed);
    head.append(make("span", `verdict ${passed ? "pass" : "fail"}`, passed ? "✓ judged right" : "✗ judged wrong"));
  } else {
    head.append(make("span", "verdict muted", `${view.image.width} × ${view.image.height}`));
  }
  const frame = make("button", "frame");
  frame.type = "button";
  frame.title = `enlarge ${view.label}`;
  frame.append(pictureOf(view.image));
  frame.addEventListener("click", () => zoom.open(index));
  box.append(head, frame);
  if (view.said.length) {
    const said = make("div", `said ${view.kind}`);
    for (const [title, text] of view.said) {
      const words = make("p", "", text);
      words.dir = "auto";
      said.append(make("h3", "", title), words);
    }
    box.append(said);
  }
  if (view.evaluation) {
    const list = make("div", "axes");
    if (view.step_evaluation) list.append(...axes(view.step_evaluation, "This step alone"), ...axes(view.evaluation, "The whole request"));
    else list.append(...axes(view.evaluation));
    box.append(list);
  }
  return box;
}

function show(sample) {
  state.sample = sample;
  $("prompt").textContent = sample.prompt;
  $("explanation").textContent = sample.explanation;
  $("tags").replaceChildren(make("span", "mode", MODES[sample.mode]), ...[sample.category, sample.key].filter(Boolean).map((text) => make("span", "", text)));
  $("strip").replaceChildren(...views(sample).map(card));
  $("main").scrollTo(0, 0);
  $("comment").value = drafts.get(sample.position) ?? (sample.decision ? sample.decision.comment : "");
  showProgress();
}

function showProgress() {
  const count = (letter) => state.verdicts.reduce((sum, mark) => sum + (mark === letter), 0);
  const accepted = count("a"), rejected = count("r");
  $("n-accept").textContent = accepted.toLocaleString("en");
  $("n-reject").textContent = rejected.toLocaleString("en");
  $("n-open").textContent = (state.samples - accepted - rejected).toLocaleString("en");
  $("bar-accept").style.width = `${(100 * accepted) / state.samples}%`;
  $("bar-reject").style.width = `${(100 * rejected) / state.samples}%`;
  const mark = state.verdicts[state.position];
  $("accept").setAttribute("aria-pressed", String(mark === "a"));
  $("reject").setAttribute("aria-pressed", String(mark === "r"));
  $("mine").textContent = mark === "a" ? "you accepted this" : mark === "r" ? "you rejected this" : accepted + rejected === state.samples ? "all judged" : "";
  $("undo").disabled = state.latest === null;
  $("previous").disabled = state.position <= 0;
  $("next").disabled = state.position >= state.samples - 1;
  $("open").disabled = nextOpen() === null;
  $("position").value = state.position + 1;
  document.title = `${state.position + 1} / ${state.samples} – review`;
}

// -- where we are --

function fetched(position) {
  if (!known.has(position)) {
    if (known.size > 12) known.delete(known.keys().next().value);
    const promise = ask(`sample/${position}`);
    promise.catch(() => known.delete(position));
    known.set(position, promise);
  }
  return known.get(position);
}

async function go(position) {
  if (!(position >= 0 && position < state.samples)) return;
  state.position = position;
  history.replaceState(null, "", `#${position + 1}`);
  $("main").setAttribute("aria-busy", "true");
  try {
    const sample = await fetched(position);
    if (state.position !== position) return; // gone on meanwhile
    show(sample);
    complain("");
    $("main").setAttribute("aria-busy", "false");
    ahead(position);
  } catch (error) {
    complain(error.message);
    showProgress();
  }
}

function ahead(position) {
  for (const next of new Set([nextOpen(), position + 1])) {
    if (next === null || next >= state.samples) continue;
    fetched(next).then((sample) => {
      for (const { image } of views(sample)) new Image().src = `image/${encodeURIComponent(image.name)}`;
    }).catch(() => {});
  }
}

function nextOpen() {
  for (let offset = 1; offset <= state.samples; offset++) {
    const position = (state.position + offset) % state.samples;
    if (state.verdicts[position] === ".") return position;
  }
  return null;
}

// -- deciding --

async function alone(act) {
  if (state.busy || !state.sample || state.sample.position !== state.position) return;
  state.busy = true;
  complain("");
  try {
    await act();
  } catch (error) {
    complain(`Not saved: ${error.message}`);
  } finally {
    state.busy = false;
  }
}

const decide = (verdict) => alone(async () => {
  const position = state.position;
  const request = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  const { decision } = await ask("decide", { position, verdict, comment: $("comment").value, request });
  state.verdicts[position] = verdict[0];
  state.latest = decision;
  known.delete(position);
  drafts.delete(position);
  state.sample.decision = decision;
  $("comment").blur();
  const next = nextOpen();
  if (next === null) showProgress();
  else await go(next);
});

const undo = () => alone(async () => {
  if (state.latest === null) return;
  const { undone, standing, latest } = await ask("undo", { number: state.latest.number });
  state.latest = latest;
  if (undone) {
    state.verdicts[undone.position] = standing ? standing.verdict[0] : ".";
    drafts.set(undone.position, undone.comment);
    known.delete(undone.position);
    await go(undone.position);
  } else showProgress();
});

// -- enlarging --

const zoom = {
  index: 0, scale: 1, held: false,
  open(index) {
    const rows = views(state.sample);
    if (index < 0 || index >= rows.length) return;
    Object.assign(this, { rows, index, scale: 1, held: false });
    $("film").replaceChildren(...rows.map((row, i) => {
      const button = make("button");
      button.type = "button";
      button.title = row.label;
      button.append(pictureOf(row.image));
      button.addEventListener("click", () => this.to(i));
      return button;
    }));
    if (!$("zoom").open) $("zoom").showModal();
    this.draw();
  },
  to(index) {
    this.index = (index + this.rows.length) % this.rows.length;
    this.draw();
  },
  draw() {
    const row = this.held ? this.rows[0] : this.rows[this.index];
    const { width, height, name } = row.image;
    const room = $("zoom").querySelector(".stage").getBoundingClientRect();
    const fit = Math.min((room.width - 8) / width, (room.height - 8) / height);
    const image = $("zoom-image");
    image.src = `image/${encodeURIComponent(name)}`;
    image.classList.toggle("pixels", Math.max(width, height) <= SMALL);
    image.style.width = `${width * fit * this.scale}px`;
    image.style.height = `${height * fit * this.scale}px`;
    $("zoom-label").textContent = row.label;
    $("zoom-text").textContent = row.said.map(([, text]) => text).join("\n");
    [...$("film").children].forEach((button, i) => button.setAttribute("aria-current", String(this.rows[i] === row)));
  },
  key(event) {
    if (event.key === "ArrowRight") this.to(this.index + 1);
    else if (event.key === "ArrowLeft") this.to(this.index - 1);
    else if (event.key === " ") { if (!this.held) { this.held = true; this.draw(); } }
    else if (event.key === "+" || event.key === "=") { this.scale = Math.min(8, this.scale * 1.5); this.draw(); }
    else if (event.key === "-") { this.scale = Math.max(1, this.scale / 1.5); this.draw(); }
    else if (/^[1-9]$/.test(event.key) && event.key <= this.rows.length) this.to(event.key - 1);
    else if (event.key.toLowerCase() === "z") $("zoom").close();
    else return;
    event.preventDefault();
  },
};

// -- keys and buttons --

const keys = {
  a: () => decide("accept"), r: () => decide("reject"), u: undo, c: () => $("comment").focus(),
  n: () => { const next = nextOpen(); if (next !== null) go(next); },
  g: () => { $("position").focus(); $("position").select(); },
  z: () => state.sample && zoom.open(views(state.sample).length - 1),
  "?": () => $("help").showModal(),
  arrowleft: () => go(state.position - 1), arrowright: () => go(state.position + 1),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if ($("help").open) return;
  if ($("zoom").open) return zoom.key(event);
  if (event.target instanceof HTMLInputElement) {
    if (event.key === "Escape" || event.key === "Enter") event.target.blur(); // a new number counts when it is left
    return;
  }
  if (event.repeat && !event.key.startsWith("Arrow")) return; // a key that is held down decides once
  const act = /^[1-9]$/.test(event.key) ? () => state.sample && zoom.open(Number(event.key) - 1) : keys[event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act();
});
document.addEventListener("keyup", (event) => {
  if (event.key === " " && zoom.held) { zoom.held = false; zoom.draw(); }
});
$("comment").addEventListener("input", () => drafts.set(state.position, $("comment").value));
$("position").addEventListener("change", () => {
  const position = Number.parseInt($("position").value, 10) - 1;
  $("position").blur();
  if (position >= 0 && position < state.samples) go(position);
  else $("position").value = state.position + 1;
});
for (const [id, key] of [["accept", "a"], ["reject", "r"], ["undo", "u"], ["previous", "arrowleft"], ["next", "arrowright"], ["open", "n"], ["help-button", "?"]]) {
  $(id).addEventListener("click", () => { $(id).blur(); keys[key](); });
}
$("help-close").addEventListener("click", () => $("help").close());
$("zoom").querySelector(".stage").addEventListener("click", () => $("zoom").close());
window.addEventListener("resize", () => { if ($("zoom").open) zoom.draw(); });

(async () => {
  try {
    const { reviewer, samples, verdicts, latest } = await ask("state");
    Object.assign(state, { samples, verdicts: [...verdicts], latest });
    $("reviewer").textContent = reviewer;
    $("total").textContent = samples.toLocaleString("en");
    const named = Number.parseInt(location.hash.slice(1), 10) - 1;
    state.position = named >= 0 && named < samples ? named : -1;
    await go(state.position >= 0 ? state.position : nextOpen() ?? 0);
  } catch (error) {
    complain(error.message);
  }
})();
