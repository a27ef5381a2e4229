/* Pictures of items, fetched ahead of need and kept for a while. */

const MOST_PICTURES = 300; // pictures of about 60 kB
const MOST_AHEAD = 3; // at once; what is looked at now never waits for them

export class Crops {
  constructor(transport, fovUm) {
    this.transport = transport;
    this.fovUm = fovUm;
    this.kept = new Map(); // by item and field, the promise of an object URL; the one used last at the end
    this.waiting = [];
    this.running = 0;
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

  /* Fetch these, in order, in place of what was to be fetched before. */
  ahead(items) {
    this.waiting = [...items];
    while (this.running < MOST_AHEAD && this.waiting.length) this.#run();
  }

  async #run() {
    this.running += 1;
    while (this.waiting.length) await this.picture(this.waiting.shift()).catch(() => {});
    this.running -= 1;
  }
}
