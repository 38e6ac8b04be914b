namespace Rollout.Engine;

/// <summary>How rotation frequencies follow from the config; the names are those of transformers.</summary>
public enum RopeType
{
    /// <summary>theta ^ (-2i / headDim).</summary>
    Default,

    /// <summary>The default ones divided by a factor: positions are interpolated.</summary>
    Linear,

    /// <summary>Llama 3.1: low frequencies are divided by a factor, high ones kept, those between blended.</summary>
    Llama3,
}

/// <summary>Rotary position embedding of a model. The last four are for scaled types only, 0 otherwise.</summary>
public sealed record RopeSpec(
    RopeType Type, double Theta, double Factor = 0, double LowFrequencyFactor = 0, double HighFrequencyFactor = 0,
    int OriginalPositions = 0)
{
    /// <summary>
    /// headDim / 2 inverse frequencies, computed operation by operation in fp32 as transformers does (modeling_rope_utils.py), since they
    /// are multiplied by positions in the hundred thousands.
    /// </summary>
    public float[] InverseFrequencies(int headDim)
    {
        float[] frequencies = new float[headDim / 2];
        for (int i = 0; i < frequencies.Length; i++)
        {
            // The power in double, then rounded: a correctly rounded fp32 pow, the same on every machine. PyTorch's own is off by one
            // unit in the last place now and then.
            float power = (float)Math.Pow((float)Theta, 2 * i / (float)headDim);
            frequencies[i] = Scale(1f / power);
        }
        return frequencies;
    }

    private float Scale(float frequency)
    {
        float factor = (float)Factor;
        if (Type == RopeType.Default)
            return frequency;
        if (Type == RopeType.Linear)
            return frequency / factor;

        float waveLength = (float)(2 * Math.PI) / frequency;
        if (waveLength > (float)(OriginalPositions / LowFrequencyFactor))
            return frequency / factor;
        if (waveLength < (float)(OriginalPositions / HighFrequencyFactor))
            return frequency;
        float smooth = (OriginalPositions / waveLength - (float)LowFrequencyFactor) / (float)(HighFrequencyFactor - LowFrequencyFactor);
        return (1 - smooth) * frequency / factor + smooth * frequency;
    }
}
