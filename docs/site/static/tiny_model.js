// The tiny model, computed by plain JavaScript: a Llama of 4 blocks and 4.5 million weights needs no runtime.
// It computes what PyTorch does with the same file (tests/test_site.py compares their words).

// A safetensors file's tensors as fp32; matrices lie in it as int8 with a scale for each row.
function tensors(buffer) {
  const size = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
  const read = (name) => {
    const { dtype, data_offsets: [from, to] } = header[name], bytes = buffer.slice(8 + size + from, 8 + size + to);
    return dtype === "I8" ? new Int8Array(bytes) : new Float32Array(bytes);
  };
  const found = {};
  for (const name of Object.keys(header)) {
    if (name === "__metadata__" || name.endsWith(".scale")) continue;
    const held = read(name);
    if (held instanceof Float32Array) { found[name] = held; continue; }
    const scale = read(`${name}.scale`), columns = held.length / scale.length, full = new Float32Array(held.length);
    for (let r = 0; r < scale.length; r++) for (let c = 0; c < columns; c++) full[r * columns + c] = held[r * columns + c] * scale[r];
    found[name] = full;
  }
  return { found, about: JSON.parse(header.__metadata__.about) };
}

// The weights of the fine-tune: to each matrix that has an adapter, (rows, columns), B A is added.
function tuned(found) {
  const made = { ...found };
  for (const name of Object.keys(found)) {
    if (!name.startsWith("tuned.") || !name.endsWith(".A")) continue;
    const weight = name.slice("tuned.".length, -".A".length), A = found[name], B = found[name.slice(0, -1) + "B"];
    const W = Float32Array.from(found[weight]);
    let rank = 1;
    while ((A.length / rank) * (B.length / rank) !== W.length) rank++;
    const columns = A.length / rank, rows = B.length / rank;
    for (let r = 0; r < rows; r++) for (let k = 0; k < rank; k++) {
      const b = B[r * rank + k];
      for (let c = 0; c < columns; c++) W[r * columns + c] += b * A[k * columns + c];
    }
    made[weight] = W;
  }
  return made;
}

function times(W, x) { // (rows, columns) (columns,) -> (rows,)
  const columns = x.length, out = new Float32Array(W.length / columns);
  for (let r = 0, i = 0; r < out.length; r++) {
    let sum = 0;
    for (let c = 0; c < columns; c++, i++) sum += W[i] * x[c];
    out[r] = sum;
  }
  return out;
}

function normed(x, weight, eps) { // RMSNorm
  let square = 0;
  for (const v of x) square += v * v;
  const by = 1 / Math.sqrt(square / x.length + eps);
  return x.map((v, i) => v * by * weight[i]);
}

function plus(x, y) { for (let i = 0; i < x.length; i++) x[i] += y[i]; }

// One vector for each token so far in every block: the cache is an array of {keys, values}, one a block.
class Model {
  constructor(weights, about) { this.w = weights; this.about = about; }

  // The logits of the next token. push: a vector to add after block about.block at this position, or null.
  step(token, cache, push, wanted = true) {
    const { blocks, heads, theta, eps } = this.about, w = this.w, at = cache[0].keys.length;
    const width = w["model.norm.weight"].length, size = width / heads, half = size / 2;
    const x = w["model.embed_tokens.weight"].slice(token * width, (token + 1) * width);
    const turned = (q) => { // the rotary embedding: halves of each head turn against each other
      for (let h = 0; h < width; h += size) for (let i = 0; i < half; i++) {
        const angle = at / theta ** (i / half), c = Math.cos(angle), s = Math.sin(angle), a = q[h + i], b = q[h + i + half];
        q[h + i] = a * c - b * s;
        q[h + i + half] = b * c + a * s;
      }
      return q;
    };
    for (let b = 0; b < blocks; b++) {
      const of = (part) => w[`model.layers.${b}.${part}.weight`], { keys, values } = cache[b];
      const y = normed(x, of("input_layernorm"), eps), q = turned(times(of("self_attn.q_proj"), y));
      keys.push(turned(times(of("self_attn.k_proj"), y)));
      values.push(times(of("self_attn.v_proj"), y));
      plus(x, times(of("self_attn.o_proj"), this.attend(q, keys, values, heads)));
      const z = normed(x, of("post_attention_layernorm"), eps), up = times(of("mlp.up_proj"), z);
      const gate = times(of("mlp.gate_proj"), z).map((g, i) => (g / (1 + Math.exp(-g))) * up[i]);
      plus(x, times(of("mlp.down_proj"), gate));
      if (push && b === this.about.block) plus(x, push);
    }
    return wanted ? times(w["model.embed_tokens.weight"], normed(x, w["model.norm.weight"], eps)) : null;
  }

  attend(q, keys, values, heads) {
    const size = q.length / heads, out = new Float32Array(q.length);
    for (let h = 0; h < q.length; h += size) {
      const score = keys.map((k) => { let sum = 0; for (let i = h; i < h + size; i++) sum += q[i] * k[i]; return sum / Math.sqrt(size); });
      const top = Math.max(...score), share = score.map((s) => Math.exp(s - top)), all = share.reduce((a, b) => a + b);
      values.forEach((v, t) => { for (let i = h; i < h + size; i++) out[i] += (share[t] / all) * v[i]; });
    }
    return out;
  }

  // Tokens of an answer, one by one. push acts from the prompt's last token on. draw: a function that gives a
  // number from [0, 1) for each token, which draws it at temperature 1; without it the likeliest is taken.
  *answer(prompt, push = null, draw = null, longest = 64) {
    const cache = Array.from({ length: this.about.blocks }, () => ({ keys: [], values: [] }));
    prompt.slice(0, -1).forEach((t) => this.step(t, cache, null, false));
    let token = prompt.at(-1);
    for (let n = 0; n < longest && cache[0].keys.length < this.about.context; n++) {
      token = chosen(this.step(token, cache, push), draw);
      if (token === this.about.end) return;
      yield token;
    }
  }
}

function chosen(logits, draw) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (!draw) return best;
  const share = logits.map((l) => Math.exp(l - logits[best]));
  let left = draw() * share.reduce((a, b) => a + b);
  for (let i = 0; i < share.length; i++) if ((left -= share[i]) < 0) return i;
  return best;
}

// Byte-level BPE, as the model's tokenizer.json has it.
class Tokenizer {
  constructor({ vocab, merges }) {
    this.vocab = vocab;
    this.rank = new Map(merges.map((pair, i) => [pair.join(" "), i]));
    this.piece = Object.fromEntries(Object.entries(vocab).map(([text, id]) => [id, text]));
    const plain = (b) => (b > 32 && b < 127) || (b > 160 && b < 173) || b > 173; // bytes that stand for themselves
    let spare = 256;
    this.letter = Array.from({ length: 256 }, (_, b) => String.fromCodePoint(plain(b) ? b : spare++));
    this.byte = new Map(this.letter.map((c, b) => [c, b]));
  }

  encode(text) {
    const words = text.match(/'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu) ?? [];
    return words.flatMap((word) => {
      let parts = [...new TextEncoder().encode(word)].map((b) => this.letter[b]);
      for (;;) {
        let at = -1, least = Infinity;
        for (let i = 0; i + 1 < parts.length; i++) {
          const rank = this.rank.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
          if (rank < least) [at, least] = [i, rank];
        }
        if (at < 0) break;
        parts = [...parts.slice(0, at), parts[at] + parts[at + 1], ...parts.slice(at + 2)];
      }
      return parts.map((p) => this.vocab[p]);
    });
  }

  // A question as a chat that awaits the answer.
  prompt(question) {
    const v = this.vocab;
    return [v["<|bos|>"], v["<|user|>"], ...this.encode(question), v["<|end|>"], v["<|assistant|>"]];
  }

  decode(ids) {
    const bytes = ids.flatMap((id) => [...this.piece[id]].map((c) => this.byte.get(c)));
    return new TextDecoder().decode(new Uint8Array(bytes));
  }
}

if (typeof module !== "undefined") module.exports = { tensors, tuned, Model, Tokenizer };
