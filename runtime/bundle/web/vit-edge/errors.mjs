/** What failed, why and what to do, as the errors of vit-edge in Python; `code` tells programs what went wrong. */
export class VitEdgeError extends Error {
  constructor(code, what, { reason, remedy }) {
    super(`${what}: ${reason}; ${remedy}`);
    Object.assign(this, { name: 'VitEdgeError', code, what, reason, remedy });
  }
}

/** Return an error about one image. */
export function imageRejected(reason, remedy = 'convert the image to JPEG, PNG or WebP') {
  return new VitEdgeError('image-rejected', 'cannot use the image', { reason, remedy });
}

/** Return an error's fields as a message between threads carries them; other errors get the code "internal". */
export function toFields(error) {
  if (error instanceof VitEdgeError) {
    const { code, what, reason, remedy } = error;
    return { code, what, reason, remedy };
  }
  const reason = String(error?.message ?? error);
  return { code: 'internal', what: 'cannot go on', reason, remedy: 'report this as a bug of vit-edge' };
}

/** Return the error that `toFields` took apart. */
export function fromFields({ code, what, reason, remedy }) {
  return new VitEdgeError(code, what, { reason, remedy });
}
