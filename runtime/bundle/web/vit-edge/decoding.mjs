// From an image file to upright RGB, by the decoders of the browser; what one does not decode exactly is refused.

import { VitEdgeError, imageRejected } from './errors.mjs';
import { readImageFile } from './image-file.mjs';
import { compositeOnWhite, upright } from './pixels.mjs';

// What is read back at a time, which bounds the memory of a canvas.
const ROWS = 256;
const RAW = { colorSpaceConversion: 'none', premultiplyAlpha: 'none' };

let gl = null; // one context for all images: browsers allow few

/** Return {data, width, height}, upright RGB, of a file's bytes; `exactKinds` null reads every kind. */
export async function decode(bytes, exactKinds) {
  const file = await readImageFile(bytes);
  if (exactKinds && !exactKinds.has(file.kind)) {
    throw imageRejected(`this browser decodes a ${file.kind} to other pixels than vit-edge does`, 'save it as a color JPEG or PNG');
  }
  const bitmap = await bitmapOf(file);
  try {
    const rgb = file.kind.endsWith('with alpha') ? readWithAlpha(bitmap) : readOpaque(bitmap);
    return upright({ data: rgb, width: bitmap.width, height: bitmap.height }, file.orientation);
  } finally {
    bitmap.close();
  }
}

async function bitmapOf({ parts, type, width, height }) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(new Blob(parts, { type }), RAW);
  } catch (error) {
    throw imageRejected(`the image is damaged or incomplete (${error.message})`, 'copy or export it again');
  }
  if (bitmap.width !== width || bitmap.height !== height) {
    throw imageRejected(`the browser decodes ${bitmap.width} x ${bitmap.height} pixels of ${width} x ${height}`);
  }
  return bitmap;
}

function readOpaque(bitmap) {
  const { width, height } = bitmap;
  const rgb = new Uint8Array(width * height * 3);
  const context = new OffscreenCanvas(width, Math.min(ROWS, height)).getContext('2d', { willReadFrequently: true });
  for (let top = 0, to = 0; top < height; top += ROWS) {
    const rows = Math.min(ROWS, height - top);
    context.drawImage(bitmap, 0, top, width, rows, 0, 0, width, rows);
    const { data } = context.getImageData(0, 0, width, rows);
    for (let from = 0; from < data.length; from += 4, to += 3) {
      rgb[to] = data[from];
      rgb[to + 1] = data[from + 1];
      rgb[to + 2] = data[from + 2];
    }
  }
  return rgb;
}

/** Read through WebGL: a 2D canvas multiplies colors by alpha and loses bits. */
function readWithAlpha(bitmap) {
  const { width, height } = bitmap;
  gl ??= new OffscreenCanvas(1, 1).getContext('webgl2', { premultipliedAlpha: false });
  if (!gl) throw imageRejected('an image with transparency needs WebGL 2 here', 'save it without transparency');
  const most = gl.getParameter(gl.MAX_TEXTURE_SIZE);
  if (Math.max(width, height) > most) {
    throw imageRejected(`an image with transparency may have ${most} pixels a side here`, 'scale it down first');
  }
  const rgb = new Uint8Array(width * height * 3);
  const rows = new Uint8Array(width * Math.min(ROWS, height) * 4);
  const [texture, frame] = uploaded(bitmap);
  for (let top = 0; top < height; top += ROWS) {
    const count = Math.min(ROWS, height - top);
    gl.readPixels(0, top, width, count, gl.RGBA, gl.UNSIGNED_BYTE, rows);
    compositeOnWhite(rows.subarray(0, width * count * 4), rgb, 3 * width * top);
  }
  const failed = gl.getError();
  gl.deleteFramebuffer(frame);
  gl.deleteTexture(texture);
  if (failed) throw new VitEdgeError('unavailable', 'cannot use the image', { reason: `WebGL failed (${failed})`, remedy: 'reload the page' });
  return rgb;
}

function uploaded(bitmap) {
  const [texture, frame] = [gl.createTexture(), gl.createFramebuffer()];
  gl.bindTexture(gl.TEXTURE_2D, texture);
  gl.pixelStorei(gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL, false);
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, frame);
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  return [texture, frame];
}
