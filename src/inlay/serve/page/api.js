// Questions to the server. A key, where the server needs one, lies in the tab's own storage and goes along in a header.

const STORED = "inlay-key";

/** The server has refused, or is not there (status 0). Its message is for people. */
export class Refused extends Error {
  constructor(status, message) {
    super(/^[a-z]+ /.test(message) ? message[0].toUpperCase() + message.slice(1) : message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(STORED),
  forget: () => sessionStorage.removeItem(STORED),
  set(value) {
    if (!/^[\x21-\x7e]+$/.test(value)) throw new Refused(400, "A key has letters, digits and signs, and no spaces.");
    sessionStorage.setItem(STORED, value);
  },
};

async function sent(path, body, signal) {
  const headers = {};
  if (key.get()) headers.Authorization = "Bearer " + key.get();
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: JSON.stringify(body), signal, credentials: "omit", cache: "no-store" });
  } catch (error) {
    throw gone(error);
  }
  if (!answer.ok) throw new Refused(answer.status, await reason(answer));
  return answer;
}

function gone(error) {
  return error.name === "AbortError" ? error : new Refused(0, "The server does not answer.");
}

async function reason(answer) {
  let said = "The server answers with " + answer.status + ".";
  try {
    said = (await answer.json()).error.message || said;
  } catch {
    // no error of the server's own: something between answers in its place
  }
  const wait = answer.headers.get("Retry-After");
  return wait ? said + " (Try again in " + wait + " s.)" : said;
}

/** The JSON at `path`, or that of a POST of `body`. */
export async function ask(path, body) {
  const answer = await sent(path, body);
  const kind = answer.headers.get("Content-Type") || "";
  try {
    return kind.startsWith("application/json") ? await answer.json() : await answer.text();
  } catch (error) {
    throw gone(error);
  }
}

/** The events of a streamed answer, as they come. An error among them is thrown. */
export async function* events(path, body, signal) {
  const answer = await sent(path, body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  let whole = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (left + value).split("\n");
      left = lines.pop();
      for (const line of lines.filter((one) => one.startsWith("data: "))) {
        const data = line.slice("data: ".length);
        if (data === "[DONE]") {
          whole = true;
          continue;
        }
        const event = JSON.parse(data);
        if (event.error) throw new Refused(500, event.error.message);
        yield event;
      }
    }
  } catch (error) {
    throw error instanceof Refused ? error : gone(error);
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!whole) throw new Refused(0, "The answer broke off: the server has gone.");
}
