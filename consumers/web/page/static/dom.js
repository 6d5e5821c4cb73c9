// Builds elements from data. Text is inserted as text: nothing from the database can become markup.

export const byId = (id) => document.getElementById(id);

/** Returns an element. Attributes that are functions become listeners; null and false are omitted. Children are text or elements. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(key, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Replaces the children. If one of them had the focus, the new element with the same id gets it. */
export function replace(parent, ...children) {
  const focused = parent.contains(document.activeElement) ? document.activeElement.id : "";
  parent.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
  if (focused) byId(focused)?.focus();
}

export function row(...cells) {
  return element("tr", {}, ...cells.map((cell) => (cell instanceof Node ? cell : element("td", {}, cell))));
}

export const number = (text) => element("td", { class: "number" }, text);
