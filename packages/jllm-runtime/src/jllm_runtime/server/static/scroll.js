// Auto-scroll: the end of the conversation stays in view, until the reader scrolls up.

const NEAR = 32; // pixels from the end that count as the end

export class Follower {
  /**
   * @param {HTMLElement} scroller what scrolls
   * @param {HTMLElement} content what grows in it
   * @param {HTMLElement} button shown while the end is out of view; leads there
   * @param {() => boolean} held whether something is looked at that must not move
   */
  constructor(scroller, content, button, held) {
    this.scroller = scroller;
    this.button = button;
    this.held = held;
    this.following = true;
    scroller.addEventListener("scroll", () => this.look(), { passive: true });
    button.addEventListener("click", () => {
      scroller.focus({ preventScroll: true });
      this.follow();
    });
    const observer = new ResizeObserver(() => this.grown());
    observer.observe(scroller);
    observer.observe(content);
  }

  get distance() {
    return this.scroller.scrollHeight - this.scroller.clientHeight - this.scroller.scrollTop;
  }

  look() {
    this.following = this.distance < NEAR;
    this.button.hidden = this.following;
  }

  grown() {
    if (this.held()) this.following &&= this.distance < NEAR;
    if (this.following && !this.held()) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.button.hidden = this.distance < NEAR;
  }

  follow() {
    this.following = true;
    this.grown();
  }
}
