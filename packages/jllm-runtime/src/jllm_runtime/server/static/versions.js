// Versions of a question: what was asked in its place before, each with all that followed.
//
// The question that is shown holds them as `versions`: for each the messages from there on, and null for the one shown.

/** Put another question in the place of one; what was said from there on becomes an earlier version. */
export function addVersion(messages, index, question) {
  const versions = messages[index].versions ?? [null];
  exchange(messages, index, versions, [question]);
  versions.push(null);
}

/** Show another version of a question. */
export function showVersion(messages, index, which) {
  const { versions } = messages[index];
  const shown = versions[which];
  if (shown === null) return;
  exchange(messages, index, versions, shown);
  versions[which] = null;
}

/** Where the version that is shown stands among all of them: `[1, 3]` is the second of three. */
export function place({ versions = [null] }) {
  return [versions.indexOf(null), versions.length];
}

/** All messages, those of other versions included. */
export function* everyMessage(messages) {
  for (const message of messages) {
    yield message;
    for (const version of message.versions ?? []) if (version) yield* everyMessage(version);
  }
}

function exchange(messages, index, versions, [first, ...rest]) {
  const [{ versions: _, ...question }, ...after] = messages.splice(index);
  versions[versions.indexOf(null)] = [question, ...after];
  messages.push({ ...first, versions }, ...rest);
}
