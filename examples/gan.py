"""Trains a GAN that writes digits: two models, two steps, two windows open at the same time.

    python examples/gan.py             a minute and a half on one CPU core
    python examples/gan.py --quick     three epochs in a few seconds; they write blobs

Backward of the generator G runs through the discriminator D. ``frozen(D)`` makes D a constant
while the step of G runs: backward computes no gradients of D, and its spectral norms stay. The sums
in D's open window are safe in any case.

G is told which digit to write, and D scores an image as one of that digit. The networks are small
ones after DCGAN (Radford et al. 2015, https://arxiv.org/abs/1511.06434). D has spectral
normalisation (Miyato et al. 2018, https://arxiv.org/abs/1802.05957), the loss is the hinge loss.
The result is the running mean of G's weights over the updates.

The data is 1,797 digits of 8 x 8 pixels, written by 43 people, that come with scikit-learn:

    Alpaydin, E. & Kaynak, C. (1998). Optical Recognition of Handwritten Digits. UCI Machine
    Learning Repository. https://doi.org/10.24432/C50P49
"""

import argparse
from pathlib import Path

import torch
from matplotlib.image import imsave
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn.functional import one_hot, pad, relu
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from trainkit import accumulate, amp, frozen, train_step

NOISE = 16  # numbers that G makes an image of, beside the digit


def make_generator():
    return nn.Sequential(
        *(
            nn.Linear(NOISE + 10, 256, bias=False),
            nn.Unflatten(1, (64, 2, 2)),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        ),
        *(
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        ),  # 4 x 4
        *(
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        ),  # 8 x 8
        *(nn.Conv2d(16, 1, 3, padding=1), nn.Tanh()),
    )


def make_discriminator():
    return nn.Sequential(
        *(spectral_norm(nn.Conv2d(1, 16, 3, padding=1)), nn.LeakyReLU(0.1)),
        *(spectral_norm(nn.Conv2d(16, 32, 4, stride=2, padding=1)), nn.LeakyReLU(0.1)),  # 4 x 4
        *(spectral_norm(nn.Conv2d(32, 64, 4, stride=2, padding=1)), nn.LeakyReLU(0.1)),  # 2 x 2
        *(nn.Flatten(), spectral_norm(nn.Linear(256, 10))),
    )


def write(generator, digits):
    """One image of each of these digits; (n, 1, 8, 8), from -1 to 1."""
    noise = torch.randn(len(digits), NOISE, device=digits.device)
    return generator(torch.cat([noise, one_hot(digits, 10)], dim=1))


def train(images, digits, epochs):
    """Trains both on these images, and returns the averaged generator."""
    generator, discriminator = (
        make_generator().to(images.device),
        make_discriminator().to(images.device),
    )
    average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    optimizer_g, optimizer_d = (
        torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.0, 0.99), fused=True)
        for model in (generator, discriminator)
    )
    precision = amp()

    def score(images, digits):
        return (
            discriminator(images).gather(1, digits[:, None]).float()
        )  # or the loss would be a bfloat16 too

    @train_step(optimizer_d, accumulate(2), precision)
    def step_d(images, digits):
        fakes = write(generator, digits).detach()
        # With the number of images, so that a smaller last batch counts for what it is.
        return relu(1 - score(images, digits)).mean() + relu(1 + score(fakes, digits)).mean(), len(
            digits
        )

    @train_step(
        optimizer_g,
        accumulate(2),
        precision,
        frozen(discriminator),
        after=lambda: average.update_parameters(generator),
    )
    def step_g(digits):
        return -score(write(generator, digits), digits).mean(), len(digits)

    loader = DataLoader(TensorDataset(images, digits), batch_size=32, shuffle=True)
    for epoch in range(1, epochs + 1):
        losses = []
        for batch in step_d.over(loader, step_g):
            losses.append(torch.stack([step_d(*batch).loss, step_g(batch[1]).loss]))
        loss_d, loss_g = torch.stack(losses).mean(0).tolist()
        print(f"epoch {epoch:3}: loss of D {loss_d:.3f}, of G {loss_g:6.3f}", flush=True)
    return average.eval()


def report(name, images, digits, judge):
    """Prints what the nearest of the images that G was trained on say of others.

    How often the nearest five are of the right digit; the distance to the nearest, which is 0 for a
    copy; and that between two images of the same digit, which is 0 where all are the same.
    """
    images = images.flatten(1)
    nearest = judge.kneighbors(images, n_neighbors=1)[0].mean()
    apart = sum(torch.pdist(images[digits == digit]).mean() for digit in range(10)) / 10
    print(f"{name:15}{judge.score(images, digits):8.3f}{nearest:13.2f}{apart:18.2f}")


def save(path, real, written):
    """A picture of ten columns, a row of real digits above those that were written."""
    rows = [pad(image, (1, 1, 1, 1), value=-0.5) for image in torch.cat([real, written])[:, 0]]
    rows = [torch.cat(rows[start : start + 10], dim=1) for start in range(0, len(rows), 10)]
    picture = torch.cat([rows[0], torch.ones(2, 100), *rows[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(
        path,
        picture.repeat_interleave(6, 0).repeat_interleave(6, 1).numpy(),
        cmap="gray",
        vmin=-1,
        vmax=1,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="three epochs: too few to learn much")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs"), help="folder for the picture (%(default)s)"
    )
    options = parser.parse_args()

    torch.set_num_threads(1)  # layers as small as these gain nothing from more
    torch.manual_seed(options.seed)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    images, unseen, digits, unseen_digits = train_test_split(
        images, torch.tensor(digits), test_size=0.2, random_state=0
    )
    generator = train(images.to(device), digits.to(device), 3 if options.quick else options.epochs)

    asked = torch.arange(500) % 10
    with torch.no_grad():
        written = write(generator, asked.to(device)).cpu()
    judge = KNeighborsClassifier().fit(images.flatten(1), digits)  # by the five nearest
    print(f"\n{'':15}accuracy   to nearest   within a digit")
    report("real, unseen", unseen, unseen_digits, judge)
    report("written", written, asked, judge)
    path = options.output / "gan.png"
    save(
        path, torch.stack([unseen[unseen_digits == digit][0] for digit in range(10)]), written[:100]
    )
    print(f"\ndigits: {path}")


if __name__ == "__main__":
    main()
