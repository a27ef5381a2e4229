/* Pictures of items, fetched ahead of need and kept for a while. */

const MOST_PICTURES = 300; // pictures of about 60 kB
// Of a browser's six for a server: for a page and what comes; for what is looked at; the rest is for decisions and tiles.
const MOST_AT_ONCE = 3;
const MOST_LOOKED_AT = 2;

export class Crops {
  constructor(transport, fovUm) {
    this.transport = transport;
    this.fovUm = fovUm;
    this.kept = new Map(); // by item and field, the promise of an object URL; the one used last at the end
    this.turns = []; // what fetches the pictures of a page
    this.waiting = []; // items to come
    this.running = 0;
    this.looks = 0; // fetches of what is, or was, looked at
    this.look = null; // begins the next of them
  }

  /* The picture of the item looked at, which waits for no others but a few of those looked at just before: of an arrow
     held down most are passed by, and are refused. */
  async lookedAt(item) {
    this.look?.(false);
    this.look = null;
    if (this.looks >= MOST_LOOKED_AT && !this.kept.has(`${item.id} ${this.fovUm}`)) {
      const mine = await new Promise((begin) => { this.look = begin; });
      if (!mine) throw new Error("Passed by.");
    }
    this.looks += 1;
    try {
      return await this.picture(item);
    } finally {
      this.looks -= 1;
      this.look?.(true);
      this.look = null;
    }
  }

  picture(item) {
    const fovUm = this.fovUm;
    const key = `${item.id} ${fovUm}`;
    let promise = this.kept.get(key);
    this.kept.delete(key);
    promise ??= this.transport.request("crop", { id: item.id, fov_um: fovUm }).then((blob) => URL.createObjectURL(blob));
    this.kept.set(key, promise);
    promise.catch(() => this.kept.delete(key)); // asked for again, it is fetched again
    if (this.kept.size > MOST_PICTURES) {
      const [oldest, dropped] = this.kept.entries().next().value;
      this.kept.delete(oldest);
      dropped.then(URL.revokeObjectURL, () => {});
    }
    return promise;
  }

  /* The picture of an item when it is its turn among those asked for so; of a page that was left, never. */
  inTurn(item) {
    if (this.kept.has(`${item.id} ${this.fovUm}`)) return this.picture(item);
    return new Promise((resolve, reject) => {
      this.turns.push(() => this.picture(item).then(resolve, reject));
      this.#work();
    });
  }

  /* Another page is shown. */
  turnsOver() {
    this.turns = [];
  }

  /* Fetch these, in order, after those of the page, in place of what was to be fetched before. */
  ahead(items) {
    this.waiting = [...items];
    this.#work();
  }

  #work() {
    while (this.running < MOST_AT_ONCE && (this.turns.length || this.waiting.length)) this.#run();
  }

  async #run() {
    this.running += 1;
    while (this.turns.length || this.waiting.length) {
      const turn = this.turns.shift() ?? this.#ahead(this.waiting.shift());
      await turn();
    }
    this.running -= 1;
  }

  #ahead(item) {
    return () => this.picture(item).catch(() => {});
  }
}
