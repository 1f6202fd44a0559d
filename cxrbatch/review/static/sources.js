// Where the images of a page come from: a filtered list, or a round. A key names an image in it.

// `place` tells lists and rounds apart: an undo takes back only what was done here.
export function sourceOf({ round, query, image, part, position }) {
  return round ? roundSource(round, part, position) : listSource(query, image);
}

function listSource(query, image) {
  const suffix = query ? `?${query}` : "";
  return {
    place: "images",
    first: image,
    api: (key) => `/api/images/${key}${suffix}`,
    url: (key) => `/images/${key}${suffix}`,
    keyOf: (path) => path.match(/^\/images\/(\d+)/)?.[1],
  };
}

// part: "read", whose keys are positions of this reader, or "decide", whose keys are images.
function roundSource(round, part, position) {
  return {
    place: `rounds/${round}/${part}`,
    first: position,
    api: (key) => `/api/rounds/${round}/${part}/${key}`,
    url: (key) => `/rounds/${round}/${part}/${key}`,
    keyOf: (path) => path.match(/\/(?:read|decide)\/(\d+)/)?.[1],
  };
}
