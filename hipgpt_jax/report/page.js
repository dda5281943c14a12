"use strict";
(() => {
  const tip = document.getElementById("tip");
  const facts = new WeakMap(); // text element -> the facts of its tokens, parsed when first asked for
  let token = null;

  const factsOf = (text) => {
    if (!facts.has(text)) facts.set(text, JSON.parse(text.nextElementSibling.textContent));
    return facts.get(text);
  };

  const SIGNS = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍" };
  const UNSEEN = /[\u0000-\u0020\u007f-\u00a0\u00ad\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff]/g;
  const visible = (text) =>
    text.replace(UNSEEN, (char) => {
      const code = char.charCodeAt(0);
      if (code < 32) return SIGNS[char] ?? String.fromCharCode(0x2400 + code);
      return SIGNS[char] ?? "⟨U+" + code.toString(16).toUpperCase().padStart(4, "0") + "⟩";
    });

  const percent = (logprob) => {
    const share = 100 * Math.exp(logprob);
    if (share === 0) return "0 %";
    if (share < 1e-3) return share.toExponential(1).replace("-", "−") + " %";
    return (share > 99.995 ? "100" : share.toPrecision(3)) + " %";
  };
  const number = (value) => {
    const size = Math.abs(value);
    const text = size > 0 && size < 1e-3 ? value.toExponential(2) : value.toFixed(size < 1 ? 4 : size < 100 ? 3 : 1);
    return text.replaceAll("-", "−");
  };

  const add = (parent, tag, text, name) => {
    const element = parent.appendChild(document.createElement(tag));
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };

  const addAlternative = (list, id, text, logprob, chosen) => {
    const row = add(list, "li", undefined, chosen ? "chosen" : "");
    add(row, "code", visible(text) || `id ${id}`);
    add(add(row, "i"), "u").style.width = 100 * Math.exp(logprob) + "%";
    add(row, "b", percent(logprob));
    if (chosen) row.setAttribute("aria-current", "true");
  };

  const fill = (index, text, known) => {
    const id = known.id[index];
    const logprob = known.logprob[index];
    const best = known.top?.[index];
    const name = text || best?.find((other) => other[0] === id)?.[2] || "";
    const bits = logprob === 0 ? 0 : -logprob / Math.LN2;
    tip.replaceChildren();
    add(tip, "p", name ? visible(name) : "no text of its own", "token");
    const list = add(tip, "dl");
    for (const [key, value] of [
      ["probability", percent(logprob)],
      ["log-probability", number(logprob)],
      ["surprise, bits", number(bits)],
      ["id", id],
      ["rank", known.rank[index]],
      ["token", `${index + 1} of ${known.id.length}`],
      ["sampled probability", percent(known.sampled[index])],
      ["candidates", known.kept[index]],
      ["lead", known.lead[index] === null ? "–" : number(known.lead[index])],
      ["cut", known.cut[index] === null ? "–" : number(known.cut[index])],
    ]) {
      const pair = add(list, "div");
      add(pair, "dt", key);
      add(pair, "dd", value).dataset.fact = key;
    }
    if (!best) {
      add(tip, "p", "Alternatives are recorded with --top_logprobs 5", "none");
      return;
    }
    const rows = add(tip, "ol");
    for (const [other, otherLogprob, otherText] of best) {
      addAlternative(rows, other, otherText, otherLogprob, other === id);
    }
    if (!best.some((other) => other[0] === id)) addAlternative(rows, id, name, logprob, true);
  };

  const place = () => {
    if (!token) return;
    const boxes = token.getClientRects();
    const at = boxes[0] ?? token.getBoundingClientRect();
    const below = (boxes[boxes.length - 1] ?? at).bottom + 8;
    const size = tip.getBoundingClientRect();
    const fits = below + size.height < innerHeight;
    const left = Math.max(8, Math.min(at.left - 12, document.documentElement.clientWidth - size.width - 8));
    tip.style.transform = `translate(${left}px, ${fits ? below : Math.max(8, at.top - size.height - 8)}px)`;
  };

  const hide = () => {
    token?.classList.remove("on");
    token = null;
    tip.hidden = true;
  };

  const show = (next) => {
    if (next === token) return;
    hide();
    token = next;
    const text = token.parentElement;
    token.classList.add("on");
    fill(Array.prototype.indexOf.call(text.children, token), token.textContent, factsOf(text));
    tip.hidden = false;
    place();
  };

  const tokenAt = (target) => target.closest?.(".text > span");
  const point = (event) => {
    const next = tokenAt(event.target);
    if (next) show(next);
    else hide();
  };

  const step = (text, key) => {
    const at = token?.parentElement === text ? token : null;
    if (key === "Home") return text.firstElementChild;
    if (key === "End") return text.lastElementChild;
    if (key === "ArrowRight") return at ? at.nextElementSibling : text.firstElementChild;
    if (key === "ArrowLeft") return at ? at.previousElementSibling : text.lastElementChild;
    return null;
  };

  document.addEventListener("mouseover", point);
  document.addEventListener("click", point);
  document.documentElement.addEventListener("mouseleave", hide);
  document.addEventListener("focusin", ({ target }) => {
    if (target.matches(".text:focus-visible")) show(target.firstElementChild);
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    if (!event.target.matches(".text") || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    const next = step(event.target, event.key);
    if (!next) return;
    event.preventDefault();
    show(next);
    next.scrollIntoView({ block: "nearest" });
  });
  addEventListener("scroll", place, { passive: true });
  addEventListener("resize", place);

  const root = document.documentElement;
  const button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const label = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    label();
  });
  dark.addEventListener("change", label);
  label();
})();
