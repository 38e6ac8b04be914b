using System.Runtime.InteropServices;
using Rollout.Kernels;

namespace Rollout.Micro;

/// <summary>Random tensors, and steps, of the sizes of Shape S (perf/load), for measurements of single operations.</summary>
internal static class Workload
{
    public const int Hidden = 896;
    public const int Intermediate = 4864;
    public const int Heads = 14;
    public const int KvHeads = 2;
    public const int HeadDim = 64;
    public const int QkvOutputs = (Heads + 2 * KvHeads) * HeadDim;
    public const int Vocabulary = 32768;

    // With weights of standard deviation 0.02 and 896 inputs, hidden states of this scale give logits as spread as a trained model's (3).
    public const float HiddenScale = 8.6f;

    /// <summary>Uniform in ±<paramref name="scale"/>, stored as bf16.</summary>
    public static Weight RandomWeight(Backend backend, int outputs, int inputs, float scale = 0.035f)
    {
        Weight weight = backend.AllocateWeight(outputs, inputs);
        Fill(backend, weight, scale);
        return weight;
    }

    public static void Fill(Backend backend, Weight weight, float scale = 0.035f)
    {
        ushort[] values = RandomBFloat16((long)weight.Outputs * weight.Inputs, scale);
        backend.WriteWeight(weight, 0, MemoryMarshal.AsBytes<ushort>(values), DType.BFloat16);
    }

    public static ushort[] RandomBFloat16(long count, float scale = 0.035f)
    {
        Random random = new(1);
        ushort[] values = new ushort[count];
        for (int i = 0; i < values.Length; i++)
            values[i] = (ushort)(BitConverter.SingleToUInt32Bits(scale * (random.NextSingle() * 2 - 1)) >> 16);
        return values;
    }

    /// <summary>Uniform in ±<paramref name="scale"/>.</summary>
    public static Tensor RandomTensor(Backend backend, int rows, int columns, float scale = HiddenScale)
    {
        Random random = new(2);
        float[] values = new float[rows * columns];
        for (int i = 0; i < values.Length; i++) values[i] = scale * (random.NextSingle() * 2 - 1);
        Tensor tensor = backend.AllocateTensor(rows, columns);
        tensor.Write(rows, values);
        return tensor;
    }

    /// <summary>
    /// One token each of <paramref name="sequences"/> sequences at position <paramref name="context"/> - 1, each sampling a token. The
    /// first <paramref name="shared"/> positions, whole blocks, are in the same blocks for all. There is room for
    /// <paramref name="alternatives"/> a sequence.
    /// </summary>
    public static StepLayout DecodeStep(int sequences, int context, int shared = 0, int alternatives = 0)
    {
        int blocks = BlocksOf(context);
        int sharedBlocks = shared / KvCache.BlockTokens;
        StepLayout step = new(sequences, sequences, blocks, sequences, sequences * alternatives, maxBiases: 0)
        {
            SequenceCount = sequences,
            OutputCount = sequences,
            QueryCount = sequences,
        };
        for (int s = 0; s < sequences; s++)
        {
            step.RowStart[s + 1] = s + 1;
            step.TokenIds[s] = s;
            step.Positions[s] = context - 1;
            step.OutputRows[s] = s;
            step.Queries[s] = new SampleQuery
            {
                OutputIndex = s,
                Target = -1,
                Temperature = 1,
                TopP = 1,
                Position = context,
                SampleIndex = (uint)s,
            };
            for (int b = 0; b < blocks; b++)
                step.BlockTables[(s * blocks) + b] = b < sharedBlocks ? b : sharedBlocks + (s * (blocks - sharedBlocks)) + b - sharedBlocks;
        }

        return step;
    }

    public static KvLayout[] KvLayouts(int layers) => [.. Enumerable.Repeat(new KvLayout(KvHeads, HeadDim, HeadDim), layers)];

    /// <summary>One layer's attention, without norms.</summary>
    public static void Attend(Backend backend, Tensor qkv, RopeTable rope, KvCache cache, int layer, Tensor output) =>
        backend.Attention(new AttentionCall
        {
            Qkv = qkv,
            Heads = Heads,
            Rope = rope,
            Scale = 0.125f,
            Cache = cache,
            Layer = layer,
            Output = output,
        });

    public static int BlocksOf(int tokens) => (tokens + KvCache.BlockTokens - 1) / KvCache.BlockTokens;
}
