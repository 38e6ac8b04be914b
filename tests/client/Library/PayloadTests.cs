using System.IO.Hashing;
using System.Text;
using CsCheck;
using Xunit;

namespace Rollout.Client.Tests;

public sealed class PayloadTests
{
    [Fact]
    public void Tensors_stand_in_order_at_aligned_offsets()
    {
        var layout = PayloadLayout.Of([Zeros("a", TensorDType.BF16, 3, 5), Zeros("b", TensorDType.F32, 64), Zeros("c", TensorDType.F16)]);
        Assert.Equal([0UL, 256, 512], layout.Manifest.Select(entry => entry.Offset));
        Assert.Equal([30L, 256, 2], layout.Sizes);
        Assert.Equal(514, layout.PayloadBytes);
        Assert.Equal([3UL, 5UL], layout.Manifest[0].Shape);
        Assert.Equal(V1.TensorDType.F32, layout.Manifest[1].Dtype);
    }

    [Fact]
    public void A_layout_fits_the_same_names_types_and_shapes_only()
    {
        var layout = PayloadLayout.Of([Zeros("a", TensorDType.BF16, 4, 2)]);
        Assert.True(layout.Fits([Zeros("a", TensorDType.BF16, 4, 2)], PayloadLayout.Alignment));
        Assert.False(layout.Fits([Zeros("b", TensorDType.BF16, 4, 2)], PayloadLayout.Alignment));
        Assert.False(layout.Fits([Zeros("a", TensorDType.F16, 4, 2)], PayloadLayout.Alignment));
        Assert.False(layout.Fits([Zeros("a", TensorDType.BF16, 2, 4)], PayloadLayout.Alignment));
        Assert.False(layout.Fits([Zeros("a", TensorDType.BF16, 4, 2), Zeros("b", TensorDType.BF16, 1)], PayloadLayout.Alignment));
    }

    [Fact]
    public void Every_name_given_twice_is_listed()
    {
        TensorSource[] tensors = [.. "abba".Select(name => Zeros($"{name}", TensorDType.F32, 1))];
        var error = Assert.Throws<ArgumentException>(() => PayloadLayout.Of(tensors));
        Assert.Contains("a, b", error.Message);
        Assert.Throws<ArgumentException>(() => PayloadLayout.Of([]));
    }

    [Fact]
    public void Shapes_that_are_none_are_refused()
    {
        Assert.Throws<ArgumentException>(() => Zeros("a", TensorDType.F32, -1));
        Assert.Throws<ArgumentException>(() => new TensorSource("a", TensorDType.F32, [long.MaxValue, 2], (_, _) => { }));
        Assert.Throws<ArgumentException>(() => TensorSource.FromMemory("a", TensorDType.F32, [2], new byte[7]));
    }

    /// <summary>The values xxHash's own test vectors and xxh128sum give: most significant byte first.</summary>
    [Fact]
    public void Digests_have_the_canonical_byte_order()
    {
        Assert.Equal("99aa06d3014798d86001c324468d497f", WeightDigest.Show(XxHash128.Hash([])));
        Assert.Equal("a96faf705af16834e6c632b61e964e1f", WeightDigest.Show(XxHash128.Hash("a"u8)));
        Assert.Equal("06b05ab6733a618578af5f94892f3950", WeightDigest.Show(XxHash128.Hash("abc"u8)));
        byte[] both = [.. XxHash128.Hash("a"u8), .. XxHash128.Hash("abc"u8)];
        Assert.Equal(WeightDigest.Show(XxHash128.Hash(both)), WeightDigest.Show(WeightDigest.Combine(both)));
    }

    /// <summary>Both ways of writing give the bytes the layout promises, and the same digest, whatever the sizes.</summary>
    [Fact]
    public void Stream_and_shared_memory_carry_the_same_payload()
    {
        string folder = Directory.CreateTempSubdirectory("payload-").FullName;
        const int PieceElements = PayloadWriter.Piece / 2;
        Gen<int> size = Gen.OneOf(Gen.Int[0, 300], Gen.Int[PieceElements - 200, PieceElements + 200], Gen.Int[0, 1_500_000]);
        size.Array[1, 6].Sample(
            sizes =>
            {
                byte[][] contents = [.. sizes.Select((count, i) => Bytes(2 * count, i))];
                TensorSource[] tensors = [.. contents.Select((bytes, i) =>
                    TensorSource.FromMemory($"t{i}", TensorDType.BF16, [bytes.Length / 2], bytes))];
                var layout = PayloadLayout.Of(tensors);
                byte[] expected = new byte[layout.PayloadBytes];
                for (int i = 0; i < tensors.Length; i++)
                    contents[i].CopyTo(expected, (int)layout.Manifest[i].Offset);

                var stream = new PayloadWriter(layout, tensors, hash: true);
                byte[] streamed = new byte[layout.PayloadBytes];
                long end = 0;
                foreach ((long offset, Memory<byte> bytes) in stream.Pieces())
                {
                    Assert.Equal(end, offset);
                    bytes.Span.CopyTo(streamed.AsSpan((int)offset));
                    end = offset + bytes.Length;
                }

                var shared = new PayloadWriter(layout, tensors, hash: true);
                byte[] written;
                using (PayloadFile file = PayloadFile.Create(Math.Max(1, layout.PayloadBytes), folder))
                {
                    for (long from = 0, to; from < layout.PayloadBytes; from = to)
                    {
                        to = Math.Min(layout.PayloadBytes, from + 700_001);
                        shared.WriteToAsync(file, from, to, from, parallelism: 2, default).Wait();
                    }

                    written = File.ReadAllBytes(file.Path);
                }

                byte[] digest = XxHash128.Hash([.. contents.SelectMany(bytes => XxHash128.Hash(bytes))]);
                return end == layout.PayloadBytes && streamed.AsSpan().SequenceEqual(expected)
                    && written.AsSpan(0, expected.Length).SequenceEqual(expected)
                    && stream.Digest().AsSpan().SequenceEqual(digest) && shared.Digest().AsSpan().SequenceEqual(digest);
            },
            iter: 30,
            print: sizes => string.Join(", ", sizes));
        Assert.Empty(Directory.GetFiles(folder));
        Directory.Delete(folder);
    }

    [Fact]
    public void Without_hashing_there_is_no_digest()
    {
        TensorSource[] tensors = [TensorSource.FromMemory("a", TensorDType.BF16, [2], Encoding.ASCII.GetBytes("abcd"))];
        var writer = new PayloadWriter(PayloadLayout.Of(tensors), tensors, hash: false);
        Assert.Equal(4, writer.Pieces().Sum(piece => piece.Bytes.Length));
        Assert.Empty(writer.Digest());
    }

    private static byte[] Bytes(int count, int seed)
    {
        var bytes = new byte[count];
        new Random(seed).NextBytes(bytes);
        return bytes;
    }

    private static TensorSource Zeros(string name, TensorDType type, params long[] shape) =>
        new(name, type, shape, (_, destination) => destination.Clear());
}
