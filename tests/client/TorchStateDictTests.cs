using System.Runtime.InteropServices;
using CsCheck;
using Rollout.Client.Torch;
using TorchSharp;
using TorchSharp.Modules;
using Xunit;
using static TorchSharp.torch;

namespace Rollout.Client.Tests;

public sealed class TorchStateDictTests
{
    static TorchStateDictTests() => TorchNative.EnsureLoaded();

    [Fact]
    public void Names_types_and_shapes_are_the_modules()
    {
        using Tied module = new();
        IReadOnlyList<TorchTensor> tensors = TorchStateDict.Of(module, PublishedType.BFloat16);
        Assert.Equal(["scale", "counts", "embed_tokens.weight", "lm_head.weight"], tensors.Select(t => t.Name));
        Assert.Equal(["BF16", "I64", "BF16", "BF16"], tensors.Select(t => t.DType));
        Assert.Equal([5, 3], tensors[2].Shape);
        Assert.Equal([4, 16, 30, 30], tensors.Select(t => t.ByteLength));
        Assert.Equal(["F32", "I64", "F32", "F32"], TorchStateDict.Of(module).Select(t => t.DType));
    }

    [Fact]
    public void Fields_that_TorchSharp_registers_a_second_time_are_not_published_twice()
    {
        using Tied module = new(registerFields: true);
        Assert.Contains("_embedding", module.named_children().Select(child => child.name));
        Assert.Equal(
            ["scale", "counts", "embed_tokens.weight", "lm_head.weight"], TorchStateDict.Of(module).Select(t => t.Name));
    }

    [Fact]
    public void A_tied_tensor_is_there_under_both_names_with_the_same_bytes()
    {
        using Tied module = new();
        IReadOnlyList<TorchTensor> tensors = TorchStateDict.Of(module, PublishedType.BFloat16);
        Assert.Equal(Bytes(tensors[2]), Bytes(tensors[3]));
    }

    [Theory]
    [InlineData(PublishedType.AsIs)]
    [InlineData(PublishedType.BFloat16)]
    public void A_list_made_once_copies_what_the_module_holds_now(PublishedType type)
    {
        using Turned module = new();
        IReadOnlyList<TorchTensor> tensors = TorchStateDict.Of(module, type);
        for (int value = 7; value < 10; value++)
        {
            using (no_grad())
            {
                module.Scale.fill_(value);
                module.Transposed.fill_(value);
            }

            foreach (TorchTensor tensor in tensors)
            {
                byte[] bytes = Bytes(tensor);
                float[] held = type == PublishedType.AsIs
                    ? MemoryMarshal.Cast<byte, float>(bytes).ToArray()
                    : [.. MemoryMarshal.Cast<byte, ushort>(bytes).ToArray().Select(Single)];
                Assert.All(held, element => Assert.Equal(value, element));
            }
        }
    }

    /// <summary>Memory that is not touched is not taken: of the tensor only its ends are written and read.</summary>
    [Fact]
    public void Parts_behind_two_gigabytes_are_copied_from_where_they_are()
    {
        const long Elements = (1L << 31) + 64; // bf16: over 4 GiB
        using Tensor tensor = empty([Elements], dtype: ScalarType.BFloat16);
        TorchTensor published = new("large", tensor, PublishedType.AsIs);
        foreach (long at in (long[])[0, 1L << 30, 1L << 31])
            tensor.narrow(0, at, 8).fill_(1 + (at >> 30));

        byte[] part = new byte[16];
        foreach (long at in (long[])[0, 1L << 30, 1L << 31])
        {
            published.CopyTo(part, at * 2);
            Assert.All(MemoryMarshal.Cast<byte, ushort>(part).ToArray(), element => Assert.Equal(1 + (at >> 30), Single(element)));
        }
    }

    [Fact]
    public async Task A_module_is_pushed_as_it_is_now_again_and_again()
    {
        await using FakeSidecar fake = await FakeSidecar.StartAsync();
        await using RolloutClient client = RolloutClient.Connect(fake.Address);
        await using WeightPublisher publisher = new(client);
        using Sharing module = new();
        for (ulong version = 1; version <= 3; version++)
        {
            using (no_grad())
                module.Up.fill_(version);
            PushResult result = await publisher.PushAsync(module, cancellationToken: TestContext.Current.CancellationToken);
            Assert.Equal(version, result.Version);
            Assert.Equal(["gate", "up"], fake.Weights.Begin!.Manifest.Select(tensor => tensor.Name));
            Assert.All(fake.Weights.Begin.Manifest, tensor => Assert.Equal(V1.TensorDType.Bf16, tensor.Dtype));
            Assert.Equal(Enumerable.Repeat(BFloat16(version), 6), MemoryMarshal.Cast<byte, ushort>(fake.Weights.Tensors["up"]).ToArray());
            Assert.Equal([0, 1, 2, 3, 4, 5], MemoryMarshal.Cast<byte, ushort>(fake.Weights.Tensors["gate"]).ToArray().Select(Single));
        }

        using Tied counting = new();
        NotSupportedException error = await Assert.ThrowsAsync<NotSupportedException>(() =>
            publisher.PushAsync(counting, cancellationToken: TestContext.Current.CancellationToken));
        Assert.Contains("'counts' holds I64", error.Message, StringComparison.Ordinal);
    }

    /// <summary>Views of one storage, of every type, with and without gradients: a push reads the same as a plain copy.</summary>
    [Fact]
    public void Strides_views_and_gradients_do_not_show()
    {
        using DisposeScope scope = NewDisposeScope();
        Tensor storage = arange(7 * 6 * 5, float32).view(7, 6, 5) - 100.3f;
        (string, Func<Tensor, Tensor>)[] views =
        [
            ("whole", t => t),
            ("transposed", t => t.transpose(0, 2)),
            ("permuted", t => t.permute(1, 2, 0)),
            ("rows behind the start", t => t.narrow(0, 3, 2)),
            ("columns from the middle", t => t.narrow(2, 1, 3)),
            ("every second", t => t.slice(0, 1, 7, 2).slice(1, 0, 6, 3)),
            ("flipped", t => t.flip(0)),
            ("broadcast", t => t.narrow(1, 2, 1).expand(7, 4, 5)),
            ("diagonal", t => t.narrow(0, 0, 6).diagonal(0, 0, 1)),
            ("a scalar", t => t[4, 3, 2]),
            ("nothing", t => t.narrow(1, 6, 0)),
        ];
        foreach (ScalarType type in (ScalarType[])[ScalarType.Float32, ScalarType.BFloat16, ScalarType.Float16])
        {
            foreach ((string name, Func<Tensor, Tensor> view) in views)
            {
                foreach (bool gradient in (bool[])[false, true])
                {
                    Tensor source = storage.to(type, copy: true);
                    source.requires_grad = gradient;
                    Tensor tensor = view(source);
                    foreach (PublishedType published in Enum.GetValues<PublishedType>())
                    {
                        ScalarType sent = published == PublishedType.BFloat16 ? ScalarType.BFloat16 : type;
                        float[] plain = tensor.numel() == 0 ? [] : tensor.detach().to(float32).reshape(-1).clone().data<float>().ToArray();
                        byte[] expected = plain.SelectMany(value => sent switch
                        {
                            ScalarType.Float32 => BitConverter.GetBytes(value),
                            ScalarType.Float16 => BitConverter.GetBytes((Half)value),
                            _ => BitConverter.GetBytes(BFloat16(value)),
                        }).ToArray();
                        TorchTensor torchTensor = new("t", tensor, published);
                        Assert.Equal((name, tensor.numel() * sent.ElementSize()), (name, torchTensor.ByteLength));
                        Assert.Equal(expected, Bytes(torchTensor));
                        byte[] parts = new byte[expected.Length];
                        for (int at = 0, size = 3 * sent.ElementSize(); at < parts.Length; at += size)
                            torchTensor.CopyTo(parts.AsSpan(at, Math.Min(size, parts.Length - at)), at);
                        Assert.Equal(expected, parts);
                    }
                }
            }
        }
    }

    [Fact]
    public void Parameters_that_share_a_storage_are_each_read_from_their_own_place()
    {
        using Sharing module = new();
        Dictionary<string, float[]> tensors = TorchStateDict.Of(module)
            .ToDictionary(t => t.Name, t => MemoryMarshal.Cast<byte, float>(Bytes(t)).ToArray());
        Assert.Equal(["gate", "up"], tensors.Keys.Order());
        Assert.Equal([0, 1, 2, 3, 4, 5], tensors["gate"]);
        Assert.Equal([6, 7, 8, 9, 10, 11], tensors["up"]);
    }

    [Fact]
    public void A_frozen_parameter_is_part_of_the_model_all_the_same()
    {
        using Tied module = new();
        module.Scale.requires_grad = false;
        Assert.Contains("scale", TorchStateDict.Of(module).Select(t => t.Name));
    }

    [Fact]
    public void Rounding_to_bfloat16_is_to_nearest_ties_to_even() => Gen.Float.Array[1, 40].Sample(values =>
    {
        using DisposeScope scope = NewDisposeScope();
        ushort[] copied = MemoryMarshal.Cast<byte, ushort>(Bytes(new TorchTensor("t", tensor(values), PublishedType.BFloat16))).ToArray();
        for (int i = 0; i < values.Length; i++)
        {
            if (float.IsNaN(values[i]) ? (copied[i] & 0x7fff) <= 0x7f80 : copied[i] != BFloat16(values[i]))
                return false;
        }

        return true;
    });

    [Fact]
    public void Parts_put_together_are_the_whole() => Gen.Select(Gen.Int[1, 50], Gen.Int[1, 60]).Sample((elements, part) =>
    {
        using DisposeScope scope = NewDisposeScope();
        TorchTensor source = new("t", randn(elements), PublishedType.BFloat16);
        byte[] together = new byte[source.ByteLength];
        for (int offset = 0; offset < together.Length; offset += 2 * part)
            source.CopyTo(together.AsSpan(offset, Math.Min(2 * part, together.Length - offset)), offset);
        return together.SequenceEqual(Bytes(source));
    });

    [Theory]
    [InlineData(7, 0, "cut")]
    [InlineData(8, 2, "cut")]
    [InlineData(12, 0, "past")]
    [InlineData(8, 4, "past")]
    [InlineData(4, -4, "past")]
    public void Parts_that_do_not_fit_are_refused_by_name(int length, long offset, string reason)
    {
        using DisposeScope scope = NewDisposeScope();
        TorchTensor source = new("some.weight", zeros(2), PublishedType.AsIs);
        ArgumentException error = Assert.Throws<ArgumentException>(() => source.CopyTo(new byte[length], offset));
        Assert.Contains("'some.weight'", error.Message);
        Assert.Contains(reason, error.Message);
    }

    private static ushort BFloat16(float value)
    {
        uint bits = BitConverter.SingleToUInt32Bits(value);
        return (ushort)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }

    private static float Single(ushort bits) => BitConverter.UInt32BitsToSingle((uint)bits << 16);

    private static byte[] Bytes(TorchTensor tensor)
    {
        byte[] bytes = new byte[tensor.ByteLength];
        tensor.CopyTo(bytes);
        return bytes;
    }

    private sealed class Turned : nn.Module
    {
        public Turned() : base(nameof(Turned))
        {
            register_parameter("scale", Scale);
            register_parameter("transposed", Transposed);
        }

        public Parameter Scale { get; } = new(ones(2));

        public Parameter Transposed { get; } = new(ones(2, 3).t());
    }

    private sealed class Sharing : nn.Module
    {
        public Sharing() : base(nameof(Sharing))
        {
            Tensor fused = arange(12, float32).view(4, 3);
            register_parameter("gate", new Parameter(fused.narrow(0, 0, 2)));
            register_parameter("up", Up = new Parameter(fused.narrow(0, 2, 2)));
        }

        public Parameter Up { get; }
    }

    private sealed class Tied : nn.Module<Tensor, Tensor>
    {
        private readonly Embedding _embedding = nn.Embedding(5, 3);
        private readonly Linear _head = nn.Linear(3, 5, hasBias: false);

        public Tied(bool registerFields = false) : base(nameof(Tied))
        {
            _head.weight = _embedding.weight!;
            register_parameter("scale", Scale);
            register_buffer("counts", arange(2, int64));
            register_buffer("scratch", zeros(9), persistent: false);
            register_module("embed_tokens", _embedding);
            register_module("lm_head", _head);
            if (registerFields)
                RegisterComponents();
        }

        public Parameter Scale { get; } = new(ones(2));

        public override Tensor forward(Tensor input) => _head.forward(_embedding.forward(input));
    }
}
