using Google.Protobuf.Collections;
using Rollout.V1;

namespace Rollout.Client;

/// <summary>
/// Token ids are unsigned on the wire and int in .NET. The runtime allows an int[] to be cast to uint[], so one copy is enough.
/// </summary>
internal static class TokenArrays
{
    public static V1.TokenIds ToTokenIds(this int[] ids)
    {
        TokenIds message = new();
        message.Ids.AddRange((uint[])(object)ids);
        return message;
    }

    public static int[] ToInts(this RepeatedField<uint> field)
    {
        if (field.Count == 0)
            return [];
        int[] ids = new int[field.Count];
        field.CopyTo((uint[])(object)ids, 0);
        return ids;
    }

    public static float[] ToFloats(this RepeatedField<float> field)
    {
        if (field.Count == 0)
            return [];
        float[] values = new float[field.Count];
        field.CopyTo(values, 0);
        return values;
    }
}
