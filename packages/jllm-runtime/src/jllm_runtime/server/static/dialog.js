// Modal dialogs.

/** Show a dialog; the answer is the value of the button that closed it, "" where that was Cancel or Escape. */
export function ask(dialog) {
  return new Promise((resolve) => {
    const form = dialog.querySelector("form");
    const controller = new AbortController();
    const on = (target, type, listener) => target.addEventListener(type, listener, { signal: controller.signal });
    const end = (value) => {
      controller.abort();
      dialog.close();
      resolve(value);
    };
    // The page's policy lets no form be sent, so the dialog is closed by hand.
    on(form, "submit", (event) => {
      event.preventDefault();
      end(event.submitter?.value ?? "yes");
    });
    on(form.querySelector('button[type="button"]'), "click", () => end(""));
    on(dialog, "cancel", () => end(""));
    // The browser may close it without asking. This event comes late: it may still be that of the question before.
    on(dialog, "close", () => dialog.open || end(""));
    dialog.showModal();
  });
}
