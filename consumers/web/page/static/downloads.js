// Saves what is shown as a file: rows as CSV with exact amounts, a chart as PNG.

import { element } from "./dom.js";

const TITLE = 30; // height in CSS pixels of the line with the title above a chart

/** Saves rows of text, numbers and nulls. Times and amounts must be as the server sent them. */
export function saveCsv(name, titles, rows) {
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  save(`${name}.csv`, new Blob([[titles, ...rows].map((one) => `${one.map(cell).join(",")}\r\n`).join("")], { type: "text/csv" }));
}

/** Saves the drawn chart with the page's background and a title. `legend` is a list of [text, color]. */
export function savePng(name, drawn, title, legend = []) {
  const ratio = devicePixelRatio || 1;
  const canvas = document.createElement("canvas");
  canvas.width = drawn.width;
  canvas.height = drawn.height + TITLE * ratio * (legend.length ? 2 : 1);
  const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  context.fillStyle = style.getPropertyValue("--panel").trim();
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(drawn, 0, canvas.height - drawn.height);
  context.scale(ratio, ratio);
  context.fillStyle = style.getPropertyValue("--text").trim();
  context.font = "600 15px system-ui, sans-serif";
  context.fillText(title, 10, 21, canvas.width / ratio - 20);
  context.font = "13px system-ui, sans-serif";
  let left = 10;
  for (const [text, color] of legend) {
    context.fillStyle = color;
    context.fillText(text, left, TITLE + 18);
    left += context.measureText(text).width + 18;
  }
  canvas.toBlob((blob) => save(`${name}.png`, blob));
}

function save(name, blob) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}
