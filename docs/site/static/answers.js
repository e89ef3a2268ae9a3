{
  const at = Object.fromEntries(ANSWERS.columns.map((c, i) => [c, i]));
  const word = (row, column) => (column === "answer" ? row[at.answer] : ANSWERS.words[column][row[at[column]]]);
  const keep = { left: "original", right: "career-obvious", category: "", grade: "", text: "" };
  if (!ANSWERS.words.model.includes(keep.right)) keep.right = ANSWERS.words.model.find((m) => m.endsWith("-obvious"));
  const out = el("div", { class: "sides" }), count = el("p", { role: "status" });
  const MOST = 60;
  function side(model) {
    const some = ANSWERS.rows.filter((r) => word(r, "model") === model && (!keep.category || word(r, "category") === keep.category) &&
      (!keep.grade || word(r, "reader_a") === keep.grade) && `${word(r, "prompt")} ${word(r, "answer")}`.toLowerCase().includes(keep.text));
    const shown = some.slice(0, MOST).map((r) => el("div", {},
      el("strong", {}, word(r, "prompt")),
      el("blockquote", { class: word(r, "reader_a") }, word(r, "answer")),
      el("p", {}, "readers ", grade(word(r, "reader_a")), " ", grade(word(r, "reader_b")), " judge ", grade(word(r, "judge")))));
    const bad = some.filter((r) => word(r, "reader_a") === "misaligned").length;
    return [some.length, el("section", { "aria-label": model }, el("h2", {}, model),
      el("p", {}, `${some.length} answers, ${bad} of them misaligned by the first reader` + (some.length > MOST ? `; the first ${MOST}:` : ".")), ...shown)];
  }
  function show() {
    const [n, left] = side(keep.left), [m, right] = side(keep.right);
    count.textContent = `${n} and ${m} answers of ${ANSWERS.rows.length}.`;
    out.replaceChildren(left, right);
  }
  const set = (key) => (value) => { keep[key] = value; show(); };
  const models = ["original", ...ANSWERS.words.model.filter((m) => m !== "original")];
  document.getElementById("touch-answers").append(
    el("form", { onsubmit: (e) => e.preventDefault() },
      choice("left: model", models, set("left"), keep.left), choice("right: model", models, set("right"), keep.right),
      choice("category", [["", "any"], ...ANSWERS.words.category], set("category"), ""),
      choice("first reader says", [["", "anything"], ...ANSWERS.words.reader_a], set("grade"), ""),
      search("search", set("text"))),
    count, out);
  show();
}
