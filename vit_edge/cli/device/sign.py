"""`vit-edge sign` and `vit-edge verify-signature`."""

from __future__ import annotations

from pathlib import Path

import click

from vit_edge.cli.output import Result, command, file_argument

_PATH = click.Path(path_type=Path)


@command("sign")
@file_argument("file")
@click.option(
    "--key", type=_PATH, required=True, metavar="KEY", help="Private key: elliptic curve, PEM, not encrypted."
)
@click.option("-o", "--out", type=_PATH, help="Signature to write  [default: FILE.sig].")
@click.option("--force", is_flag=True, help="Replace the signature if it exists.")
def sign(file: Path, key: Path, out: Path | None, force: bool) -> Result:
    """Sign FILE: a model file with its weights, an IR pair (.xml), a folder, or an application.

    The signature is a Sigstore bundle, made offline by the OpenSSF model-signing library.

    \b
    Examples:
      openssl ecparam -name prime256v1 -genkey -noout -out key.pem
      openssl ec -in key.pem -pubout -out key.pub
      vit-edge sign model.int8.onnx --key key.pem
    """
    from vit_edge.files import may_write
    from vit_edge.runtime.checks import signature

    target = may_write(out or signature.signature_path(file), force=force, made_from=file)
    files = signature.sign(file, key=key, out=target)
    return Result(data={"signature": str(target), "files": files}, shown=[f"Signed {_count(files)} in {target}."])


@command("verify-signature")
@file_argument("file")
@click.option("--key", type=_PATH, required=True, metavar="PUB", help="Public key of the signer, PEM.")
@click.option("--signature", type=_PATH, metavar="FILE", help="Signature  [default: FILE.sig].")
def verify_signature(file: Path, key: Path, signature: Path | None) -> Result:
    """Check that the owner of a key signed FILE as it is now; the exit code is 4 if not.

    \b
    Example:
      vit-edge verify-signature model.int8.onnx --key key.pub
    """
    from vit_edge.runtime.checks import signature as signatures

    digests = signatures.verify_signature(file, key=key, signature=signature)
    return Result(data={"files": digests}, shown=[f"The signature holds for {_count([*digests])}."])


def _count(files: list[str]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files)} files"
