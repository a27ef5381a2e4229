/* Hundreds of thousands of boxes, found by where they are. Six float32 a box: x0, y0, x1, y1 (level-0 px), score, class;
   best score first. */

export const PER_BOX = 6;
const BOXES_PER_CELL = 8; // of the exact grid, on average
const COARSEST = 3; // of the thinned grids: 2³ cells across; the finest is the exact grid's size, at most 2⁹

export class BoxIndex {
  constructor(values, [width, height]) {
    this.values = values;
    this.n = values.length / PER_BOX;
    this.size = [Math.max(1, width), Math.max(1, height)];
    this.across = Math.max(1, Math.min(1024, Math.ceil(Math.sqrt(this.n / BOXES_PER_CELL))));
    const cells = new Uint32Array(this.n);
    this.starts = new Uint32Array(this.across ** 2 + 1);
    this.reach = 0; // half the edge of the largest box
    for (let i = 0; i < this.n; i += 1) {
      const at = i * PER_BOX;
      cells[i] = this.#cell((values[at] + values[at + 2]) / 2, (values[at + 1] + values[at + 3]) / 2, this.across);
      this.starts[cells[i] + 1] += 1;
      this.reach = Math.max(this.reach, (values[at + 2] - values[at]) / 2, (values[at + 3] - values[at + 1]) / 2);
    }
    for (let cell = 0; cell < this.across ** 2; cell += 1) this.starts[cell + 1] += this.starts[cell];
    this.order = new Uint32Array(this.n);
    const next = this.starts.slice(0, -1);
    for (let i = 0; i < this.n; i += 1) this.order[next[cells[i]]++] = i;
    this.thinned = [];
    for (let power = COARSEST; power <= 9 && 2 ** (2 * power) < 4 * this.n; power += 1) this.thinned.push(this.#thin(2 ** power));
  }

  #column(x, side, across) {
    return Math.max(0, Math.min(across - 1, Math.floor((x / this.size[side]) * across)));
  }

  #cell(x, y, across) {
    return this.#column(y, 1, across) * across + this.#column(x, 0, across);
  }

  /* The best box of each cell of a grid; -1 where there is none. */
  #thin(across) {
    const best = new Int32Array(across ** 2).fill(-1);
    for (let i = this.n - 1; i >= 0; i -= 1) {
      const at = i * PER_BOX;
      best[this.#cell((this.values[at] + this.values[at + 2]) / 2, (this.values[at + 1] + this.values[at + 3]) / 2, across)] = i;
    }
    return { across, best };
  }

  /* Calls visit(index) for each box that meets a rectangle (level-0 px). */
  each(x0, y0, x1, y1, visit) {
    const { values, order, starts, across, reach } = this;
    const [c0, c1] = [x0 - reach, x1 + reach].map((x) => this.#column(x, 0, across));
    const [r0, r1] = [y0 - reach, y1 + reach].map((y) => this.#column(y, 1, across));
    for (let row = r0; row <= r1; row += 1) {
      for (let k = starts[row * across + c0]; k < starts[row * across + c1 + 1]; k += 1) {
        const at = order[k] * PER_BOX;
        if (values[at] < x1 && values[at + 2] > x0 && values[at + 1] < y1 && values[at + 3] > y0) visit(order[k]);
      }
    }
  }

  /* Calls visit(index) for the best box of each cell in a rectangle, cells being no smaller than `least` level-0 px;
     returns false where no grid is so fine that it would spare anything. */
  eachThinned(x0, y0, x1, y1, least, visit) {
    const grid = this.thinned.findLast(({ across }) => Math.min(...this.size) / across >= least);
    if (!grid || grid === this.thinned.at(-1)) return false;
    const { across, best } = grid;
    const [c0, c1] = [x0, x1].map((x) => this.#column(x, 0, across));
    const [r0, r1] = [y0, y1].map((y) => this.#column(y, 1, across));
    for (let row = r0; row <= r1; row += 1) {
      for (let column = c0; column <= c1; column += 1) {
        const i = best[row * across + column];
        if (i >= 0) visit(i);
      }
    }
    return true;
  }
}
