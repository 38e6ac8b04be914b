using System.IO.Hashing;
using CsCheck;
using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>A tensor's digest on the device equals the host's digest of its bytes.</summary>
public sealed class CudaDigestTests
{
    // Around every boundary of the algorithm: sizes digested on the host, stripes of 64, blocks of 1024, pieces of 4096.
    private static readonly Gen<int> s_length = Gen.OneOf(
        Gen.OneOf(0, 1, 16, 17, 240, 241, 255, 256, 1023, 1024, 1025, 1087, 1088, 1089, 2048, 2049, 4096, 4097, 5120, 5121, 8192, 8193),
        Gen.Int[0, 40_000]);

    [Fact]
    public void Digests_on_the_device_are_those_of_the_host()
    {
        SimulatedDevice.Require();
        using CudaBackend backend = new(0);
        using CudaDigest digest = backend.CreateDigest(XxHash128.Hash, pieceBytes: 4096);
        using DeviceBuffer memory = backend.Device.Allocate(100 * 40_016L);
        Gen.Select(Gen.Select(s_length, Gen.Int[0, 15]).Array[1, 100], Gen.Int).Sample(
            (tensors, seed) =>
            {
                Random random = new(seed);
                (nuint, long)[] placed = new (nuint, long)[tensors.Length];
                byte[][] expected = new byte[tensors.Length][];
                for (int t = 0; t < tensors.Length; t++)
                {
                    (int length, int shift) = tensors[t]; // at any address
                    byte[] bytes = new byte[length];
                    random.NextBytes(bytes);
                    placed[t] = (memory.Pointer + (nuint)((t * 40_016) + shift), length);
                    backend.Device.Upload(placed[t].Item1, bytes);
                    expected[t] = XxHash128.Hash(bytes);
                }

                Assert.Equal(expected, digest.Of(placed));
            },
            iter: 12,
            threads: 1);
    }

    /// <summary>
    /// Pieces as large as an update's: more blocks than are summed at a time, and a tensor that ends with one, begins the next, or is far
    /// smaller.
    /// </summary>
    [Fact]
    public void Digests_of_tensors_of_megabytes_are_those_of_the_host()
    {
        SimulatedDevice.Require();
        const int AtATime = 256 * 8 * 1024;
        using CudaBackend backend = new(0);
        using CudaDigest digest = backend.CreateDigest(XxHash128.Hash, pieceBytes: 2 * AtATime);
        int[] lengths = [AtATime, AtATime + 1025, 300, (2 * AtATime) + 1, (2 * AtATime) + 1025, 5];
        byte[] bytes = new byte[(2 * AtATime) + 1025];
        new Random(4).NextBytes(bytes);
        using DeviceBuffer memory = backend.Device.Allocate(bytes.Length);
        backend.Device.Upload(memory.Pointer, bytes);
        Assert.Equal(
            lengths.Select(length => XxHash128.Hash(bytes.AsSpan(bytes.Length - length))),
            digest.Of([.. lengths.Select(length => (memory.Pointer + (nuint)(bytes.Length - length), (long)length))]));
    }
}
