// One answer while it is generated. Texts of models and people are only ever put in place as text (textContent).
export const MODES = { auto: "The model decides", direct: "Direct", reflection: "Reflection", multi_step: "Multi-step", interleaved: "Texts and images" };
const FIELDS = { failure_analysis: "What went wrong", improvement_plan: "What to do", instruction: "Next step", text: "Text", observation: "Observation" };
const TITLES = { image: "Image", evaluation: "Evaluation", reflection: "Reflection", step: "Step", text: "Text" };
const STATES = { queued: "waiting", running: "drawing", done: "done", stopped: "stopped", failed: "failed" };
const SMALL = 256; // images up to this many pixels a side are enlarged without smoothing

export function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

export async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  return read(await fetch(path, { ...options, cache: "no-store" }).catch(() => null));
}

export async function read(answer) {
  if (answer === null) throw new Error("The server does not answer.");
  const value = await answer.json().catch(() => ({ error: { message: `The server answered ${answer.status}.` } }));
  if (!answer.ok) throw new Error(value.error.message);
  return value;
}

export class AnswerView {
  // `act`: useAsReference(blob or url), upload(file) -> name, go(view, request), complain(error), over(view)
  constructor(request, act) {
    this.request = request;
    this.act = act;
    this.id = "";
    this.parts = [];
    this.state = { state: "queued", position: 0 };
    this.box = make("article", "answer busy");
    this.box.setAttribute("aria-label", `Answer to ${request.prompt}`);
    this.head = make("div", "head");
    this.status = make("span", "status");
    this.status.setAttribute("role", "status");
    this.asked = make("p", "asked", request.prompt);
    this.asked.dir = "auto";
    this.cost = make("p", "cost");
    this.actions = make("div", "actions");
    this.list = make("ol", "parts");
    this.box.append(this.head, this.asked, this.cost, this.actions, this.list);
    this.showState();
  }

  get over() {
    return ["done", "stopped", "failed"].includes(this.state.state);
  }

  follow(id) {
    this.id = id;
    this.source = new EventSource(`/api/answers/${encodeURIComponent(id)}/events`);
    this.source.addEventListener("part", (event) => this.setPart(JSON.parse(event.data)));
    this.source.addEventListener("state", (event) => this.setState(JSON.parse(event.data)));
    this.source.addEventListener("over", (event) => {
      this.source.close();
      this.setState(JSON.parse(event.data));
      this.act.over(this);
    });
    this.source.addEventListener("error", () => {
      if (this.source.readyState !== EventSource.CLOSED) return; // it comes again by itself
      this.setState({ ...this.state, state: "failed", error: "The connection to the server is lost." });
    });
    this.showState();
  }

  // An answer that is finished and kept.
  show(id, record) {
    this.id = id;
    record.parts.forEach((part) => this.setPart({ ...part, uri: part.file ? `/api/answers/${id}/files/${part.file}` : "" }));
    this.setState(record);
  }

  close() {
    if (this.source) this.source.close();
  }

  async stop() {
    if (!this.over && this.id) await ask(`/api/answers/${this.id}/stop`, {}).catch(this.act.complain);
  }

  setState(state) {
    this.state = state;
    for (const extra of this.parts.splice(state.parts?.length ?? state.parts ?? this.parts.length)) extra.box.remove();
    this.showState();
    if (this.over) this.parts.forEach((part) => this.setPart(part.value, true)); // with their tools
  }

  showState() {
    const { state, position, error, cost, mode, finished } = this.state;
    this.box.classList.toggle("busy", !this.over);
    this.status.className = `status ${state}`;
    this.status.textContent = state === "queued" && position ? `waiting, ${position} before it` : STATES[state];
    const seed = make("span", "chip", `seed ${this.request.seed}`);
    this.head.replaceChildren(this.status, make("span", "chip", MODES[mode || this.request.mode] ?? mode), seed, make("span", "chip", this.request.model));
    const words = [];
    if (cost) {
      const count = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
      words.push(count(cost.images, "image"), count(cost.tokens, "token"), count(cost.calls, "model call"), `${cost.seconds.toFixed(1)} s`);
      if (cost.waited >= 0.5) words.push(`${cost.waited.toFixed(1)} s waiting`);
    }
    if (this.over && !finished && state !== "failed") words.push("not finished");
    this.cost.textContent = words.join(" · ") + (error ? `${words.length ? " · " : ""}${error}` : "");
    this.showActions();
  }

  showActions() {
    const button = (text, act) => {
      const element = make("button", "", text);
      element.type = "button";
      element.addEventListener("click", act);
      return element;
    };
    if (!this.over) {
      const stop = button("Stop", () => this.stop());
      stop.setAttribute("aria-keyshortcuts", "Escape");
      this.actions.replaceChildren(stop);
      return;
    }
    const actions = [];
    if (this.parts.length && this.state.state !== "failed") {
      if (!this.state.finished) actions.push(button("Continue", () => this.continueFrom(this.parts.length - 1, {})));
      const link = make("a", "button", "Download");
      link.href = `/api/answers/${this.id}/folder.zip`;
      link.setAttribute("download", "");
      actions.push(link, button("Copy link", async (event) => {
        await navigator.clipboard.writeText(`${location.origin}/a/${this.id}`).then(
          () => (event.target.textContent = "Copied"), () => prompt("The link", `${location.origin}/a/${this.id}`));
      }));
    }
    this.actions.replaceChildren(...actions);
  }

  setPart(value, again = false) {
    const known = this.parts[value.number];
    if (known && known.editing && !again) return;
    const box = make("li", `part ${value.kind}`);
    if (known) known.box.replaceWith(box);
    else this.list.append(box);
    this.parts[value.number] = { value, box, editing: false };
    const head = make("div", "head");
    head.append(make("h2", "", this.title(value)));
    const tools = make("div", "tools");
    if (value.kind === "image") box.append(head, this.figure(value, tools));
    else if (value.kind === "evaluation") box.append(head, this.axes(value, head));
    else box.append(head, ...this.texts(value));
    if (this.over && value.complete && value.kind !== "image" && value.kind !== "text") {
      const edit = make("button", "", "Edit");
      edit.type = "button";
      edit.setAttribute("aria-label", `Edit ${this.title(value)}`);
      edit.addEventListener("click", () => this.edit(value));
      tools.append(edit);
    }
    head.append(tools);
  }

  title(value) {
    return value.kind === "text" ? "Text" : `${TITLES[value.kind]} ${value.kind === "reflection" ? value.round - 1 : value.round}`;
  }

  figure(value, tools) {
    const figure = make("figure");
    const rows = value.columns ? Math.floor(value.drawn / value.columns) : 0;
    if (value.uri) {
      const image = make("img", Math.max(value.width, value.height) <= SMALL ? "pixels" : "");
      image.src = value.uri;
      image.width = value.width;
      image.height = value.height;
      image.alt = value.complete ? `${this.title(value)} of the answer` : `${this.title(value)}, ${rows} of ${value.rows} rows drawn`;
      figure.append(image);
    }
    const caption = value.complete ? `${value.width} × ${value.height} pixels` : value.rows ? `${rows} of ${value.rows} rows` : "begins";
    figure.append(make("figcaption", "muted", caption));
    if (this.over && value.uri) {
      const use = make("button", "", "Use as reference");
      use.type = "button";
      use.addEventListener("click", () => this.act.useAsReference(value.uri));
      tools.append(use);
      if (value.complete) {
        const label = make("label", "button", "Replace and continue");
        const input = make("input", "hidden-label");
        input.type = "file";
        input.accept = "image/*";
        input.setAttribute("aria-label", `Replace ${this.title(value)} and continue`);
        input.addEventListener("change", async () => {
          try {
            if (input.files.length) this.continueFrom(value.number, { image: (await this.act.upload(input.files[0])).name });
          } catch (error) { this.act.complain(error); }
        });
        label.append(input);
        tools.append(label);
      }
    }
    return figure;
  }

  axes(value, head) {
    if (value.complete) {
      const passed = Object.values(value.verdicts).every(Boolean);
      head.append(make("span", `mark ${passed ? "pass" : "fail"}`, passed ? "✓ passes" : "✗ fails"));
    }
    const box = make("div", "axes");
    if (value.texts.observation) {
      const seen = make("p", "said observation", value.texts.observation);
      seen.dir = "auto";
      box.append(seen);
    }
    for (const [axis, passed] of Object.entries(value.verdicts)) {
      const reason = make("span", "", value.texts[axis] ?? "");
      reason.dir = "auto";
      box.append(make("span", "", axis), make("span", `mark ${passed ? "pass" : "fail"}`, passed ? "✓ pass" : "✗ fail"), reason);
    }
    return box;
  }

  texts(value) {
    return Object.entries(value.texts).flatMap(([field, text]) => {
      const said = make("p", "said", text);
      said.dir = "auto";
      return [make("h3", "", FIELDS[field] ?? field), said];
    });
  }

  edit(value) {
    const { box } = this.parts[value.number];
    this.parts[value.number].editing = true;
    const form = make("form", "edit");
    const fields = {}, verdicts = {};
    for (const [field, text] of Object.entries(value.texts)) {
      if (field in value.verdicts) {
        const check = make("label", "check", `${field} passes`);
        verdicts[field] = make("input");
        verdicts[field].type = "checkbox";
        verdicts[field].checked = value.verdicts[field];
        check.prepend(verdicts[field]);
        form.append(check);
      }
      const label = make("label", "", FIELDS[field] ?? `${field}: reason`);
      fields[field] = make("textarea");
      fields[field].value = text;
      fields[field].rows = 2;
      fields[field].dir = "auto";
      label.append(fields[field]);
      form.append(label);
    }
    const go = make("button", "primary", "Continue from here");
    const cancel = make("button", "", "Cancel");
    cancel.type = "button";
    cancel.addEventListener("click", () => this.setPart(value, true));
    const row = make("div", "row");
    row.append(go, cancel);
    form.append(row);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const texts = Object.fromEntries(Object.entries(fields).map(([field, area]) => [field, area.value]));
      const passes = Object.fromEntries(Object.entries(verdicts).map(([axis, input]) => [axis, input.checked]));
      this.continueFrom(value.number, { texts, ...(Object.keys(passes).length ? { verdicts: passes } : {}) });
    });
    box.replaceChildren(make("h2", "", `Edit ${this.title(value)}`), form);
    form.querySelector("textarea")?.focus();
  }

  continueFrom(number, edit) {
    this.act.go(this, { ...this.request, continue: { id: this.id, from: number, ...edit } });
  }
}
