// What the pages share: building elements, choices, tables that sort.
function el(name, about = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(about)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((c) => c != null));
  return made;
}

function choice(label, options, onchange, chosen) {
  const select = el("select", { onchange: () => onchange(select.value) });
  for (const o of options) {
    const [value, text] = Array.isArray(o) ? o : [o, o];
    select.append(el("option", { value, selected: value === chosen }, text));
  }
  const made = el("label", {}, label, select);
  made.select = select;
  return made;
}

function search(label, oninput) {
  const input = el("input", { type: "search", oninput: () => oninput(input.value.toLowerCase()) });
  return el("label", {}, label, input);
}

// columns: {title, value(row), cell(row)?, number?}. Returns an element with show(rows).
function table(columns, caption) {
  let rows = [], by = -1, down = false;
  const body = el("tbody"), heads = columns.map((c, i) =>
    el("th", { scope: "col", class: c.number ? "number" : null },
      el("button", { type: "button", onclick: () => { down = by === i && !down; by = i; fill(); } }, c.title)));
  const made = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    el("table", {}, el("thead", {}, el("tr", {}, ...heads)), body));
  const sign = () => (down ? -1 : 1);
  const less = (a, b) => (a == null ? (b == null ? 0 : 1) : b == null ? -1 : sign() * (a < b ? -1 : a > b ? 1 : 0));
  function fill() {
    const order = by < 0 ? rows : [...rows].sort((a, b) => less(columns[by].value(a), columns[by].value(b)));
    heads.forEach((h, i) => h.setAttribute("aria-sort", i !== by ? "none" : down ? "descending" : "ascending"));
    body.replaceChildren(...order.map((r) => el("tr", {}, ...columns.map((c) =>
      el("td", { class: c.number ? "number" : null }, c.cell ? c.cell(r) : String(c.value(r) ?? "–"))))));
  }
  made.show = (some) => { rows = some; fill(); };
  return made;
}

const grade = (name) => el("span", { class: `grade ${name}` }, name);
const number = (x, digits = 1) => (x == null ? "–" : x.toFixed(digits));
