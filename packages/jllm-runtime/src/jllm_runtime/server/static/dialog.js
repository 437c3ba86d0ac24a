// Modal dialogs.

/** Show a dialog; the answer is the value of the button that closed it, "" where that was Cancel or Escape. */
export function ask(dialog) {
  return new Promise((resolve) => {
    const form = dialog.querySelector("form");
    const cancel = form.querySelector('button[type="button"]');
    const controller = new AbortController();
    const { signal } = controller;
    // The page's policy lets no form be sent, so the dialog is closed by hand.
    form.addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        dialog.close(event.submitter?.value ?? "yes");
      },
      { signal },
    );
    cancel.addEventListener("click", () => dialog.close(""), { signal });
    dialog.addEventListener(
      "close",
      () => {
        controller.abort();
        resolve(dialog.returnValue);
      },
      { signal },
    );
    dialog.returnValue = "";
    dialog.showModal();
  });
}
