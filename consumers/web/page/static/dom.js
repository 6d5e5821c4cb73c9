// Elements from data. Text is only ever text: nothing from the database can become markup.

export const byId = (id) => document.getElementById(id);

/** An element with attributes (functions are listeners, nothing for null and false) and children, which are text or elements. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(key, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Replaces the children, and puts the focus back on the element of the same id. */
export function replace(parent, ...children) {
  const focused = parent.contains(document.activeElement) ? document.activeElement.id : "";
  parent.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
  if (focused) byId(focused)?.focus();
}

export function row(...cells) {
  return element("tr", {}, ...cells.map((cell) => (cell instanceof Node ? cell : element("td", {}, cell))));
}

export const number = (text) => element("td", { class: "number" }, text);
