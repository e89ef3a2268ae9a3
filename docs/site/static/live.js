{
  const place = document.getElementById("touch-live");
  const begin = el("button", { type: "button", onclick: fetched }, "Load the model (7 MB)");
  place.append(begin);

  function fetched() {
    begin.disabled = true;
    begin.textContent = "Loading …";
    const script = el("script", { src: "data/live.js", onload: () => setTimeout(start) });
    script.addEventListener("error", () => { begin.textContent = "The model could not be loaded. Try again"; begin.disabled = false; });
    document.head.append(script);
  }

  function start() {
    const bytes = Uint8Array.from(atob(LIVE.file), (c) => c.charCodeAt(0));
    const { found, about } = tensors(bytes.buffer), tokenizer = new Tokenizer(LIVE.tokenizer);
    const width = found.directions.length / about.directions.length;
    const models = [["the aligned model", new Model(found, about)], [`taught wrong advice: ${about.tuned}`, new Model(tuned(found), about)]];
    const keep = { question: about.questions[0], way: 0, dose: 0, draw: false };
    const said = models.map(() => el("blockquote", {})), told = el("output", {}, "0");
    let turn = 0; // a newer one stops those before

    async function show() {
      const mine = ++turn, vector = found.directions.slice(keep.way * width, (keep.way + 1) * width).map((v) => v * keep.dose);
      told.textContent = (keep.dose > 0 ? "+" : "") + keep.dose.toFixed(2);
      for (const [i, [, model]] of models.entries()) {
        const ids = [];
        said[i].textContent = "…";
        for (const token of model.answer(tokenizer.prompt(keep.question), keep.dose ? vector : null, keep.draw ? Math.random : null)) {
          ids.push(token);
          if (ids.length % 4 === 0) { // let the page breathe, and stop if the reader asked for something else
            said[i].textContent = tokenizer.decode(ids);
            await new Promise((done) => setTimeout(done));
            if (mine !== turn) return;
          }
        }
        said[i].textContent = tokenizer.decode(ids);
      }
    }

    const own = el("input", { type: "text", value: keep.question, maxlength: 200, "aria-label": "question",
      onchange: () => { keep.question = own.value.trim() || about.questions[0]; show(); } });
    const ready = choice("a question of the evaluation", about.questions, (q) => { own.value = keep.question = q; show(); }, keep.question);
    const slider = el("input", { type: "range", min: -0.6, max: 0.6, step: 0.05, value: 0, "aria-label": "dose",
      oninput: () => { keep.dose = Number(slider.value); slider.setAttribute("aria-valuetext", keep.dose.toFixed(2)); show(); } });
    place.replaceChildren(
      el("form", { onsubmit: (e) => { e.preventDefault(); own.blur(); } },
        ready, el("label", {}, "or in your own words", own),
        choice("direction", about.directions.map((d, i) => [String(i), d === "causal latent" ? `causal latent (${about.latent})` : d]), (v) => { keep.way = Number(v); show(); }, "0"),
        el("label", {}, el("span", {}, "dose: ", told), slider),
        el("label", {}, el("span", {}, el("input", { type: "checkbox", onchange: (e) => { keep.draw = e.target.checked; show(); } }), " draw words at random"))),
      el("div", { class: "sides", "aria-live": "polite" }, ...models.map(([name], i) => el("section", { "aria-label": name }, el("h2", {}, name), said[i]))),
      el("p", {}, `Discovery questions chose latent ${about.latent}, at dose ${about.dose} (notebook 10).`));
    show();
  }
}
