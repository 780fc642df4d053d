"""Plain texts on everyday matters, written for this project, to measure whether an LLM still models language."""

PLAIN_TEXTS = (
    "The baker opens her shop at six in the morning, long before the street wakes up. She has been at work since "
    "three, when the dough was ready to be shaped. By the time the first customers arrive, the shelves are full "
    "of loaves, and the smell of warm bread reaches the corner of the square. Most people buy the same thing "
    "every day. She knows what they want before they ask, and she has it wrapped by the time they have found "
    "their coins.",
    "Rivers do not run straight. Where the ground is flat, the water moves a little faster on the outside of each "
    "bend, and there it wears the bank away. On the inside it slows down and drops the sand it has carried. So "
    "every bend grows wider, year after year, until the river cuts through the narrow neck and leaves a lake "
    "behind in the shape of a bow.",
    "My grandfather repaired clocks. He kept them in the back room, thirty or forty at a time, and no two of them "
    "showed the same hour. When I asked him how he could stand the noise, he said that he only heard them when "
    "one of them stopped. I did not believe him then, but I have lived beside a railway for ten years now, and I "
    "wake up on the nights when the trains do not run.",
    "To plant a tree, dig a hole that is twice as wide as the roots and no deeper. Loosen the soil at the sides, "
    "set the tree upright, and fill the hole with the same earth that came out of it. Press it down with your "
    "foot, but not too hard. Water it well on the first day, and then once a week through the summer. Do not be "
    "worried if it does not grow much in the first year, because it is busy under the ground.",
    "The committee met on Tuesday to discuss the new library. Most members agreed that the old building was too "
    "small, but they could not agree on where the new one should be built. Some wanted it near the school, so "
    "that children could walk there after their lessons. Others thought that it should stand beside the station, "
    "where more people pass every day. The question will be put to a vote in the spring.",
    "Sound needs something to travel through. In air it covers about a mile in five seconds, in water it is four "
    "times as fast, and in steel it is faster still. This is why you can hear a train in the rails before you "
    "hear it in the air. In space, where there is nothing between the stars, the largest explosion makes no sound "
    "at all.",
    "Dear Anna, thank you for the photographs. I had forgotten how tall the grass was that summer, and how small "
    "you all were. I have put the one with the boat on the wall beside my desk. The weather here has been poor, "
    "but the garden does not mind, and we have more beans than we can eat. Please come and visit us before the "
    "end of the month, and bring your brother if he can spare the time.",
    "A good knife is the most important tool in a kitchen. It should feel balanced in the hand and be heavy "
    "enough to do some of the work by itself. Wash it by hand, dry it at once, and keep it away from other metal. "
    "A sharp blade is safer than a dull one, because it goes where you want it to go and does not slip.",
    "When the snow melts in the mountains, the bears come out of their dens. They have eaten nothing for five "
    "months and have lost a third of their weight. At first they move slowly and feed on grass and roots in the "
    "valleys. Later in the year they look for berries, fish and honey, and by autumn they may eat for twenty "
    "hours a day, until they are fat enough to sleep again.",
    "The old bridge was built by hand, stone by stone, more than four hundred years ago. It has no mortar. Each "
    "stone was cut so that it would lean on its neighbours, and the weight of the whole arch holds it together. "
    "Engineers who measured it last year found that it had moved by less than the width of a finger since it was "
    "finished.",
    "Learning a language as an adult is slow, but it is not as hard as people say. Children have years to do it "
    "and nothing else to worry about. An adult who studies for half an hour every day will be able to hold a "
    "simple conversation after six months. The secret is to speak from the first week, to make mistakes without "
    "shame, and to listen more than you read.",
    "The harbour was empty except for one small boat. Its owner sat on the deck and mended a net, as he had done "
    "every afternoon since he gave up fishing. He did not sell the nets any more. When one was finished, he "
    "looked at it for a while, took it apart, and began again the next day. The children of the village thought "
    "that he was mad, and brought him string.",
    "Salt was once so valuable that soldiers were paid with it. It kept meat and fish from going bad at a time "
    "when there was no other way to store them through the winter. Towns grew rich because they lay beside a mine "
    "or at the end of a trade road, and wars were fought over who could tax it. Today a bag of it costs less than "
    "the bag.",
    "If the engine does not start, check the battery first. Turn on the lights: if they are weak or do not come "
    "on at all, the battery is empty or one of its cables is loose. If the lights are bright, listen while you "
    "turn the key. A single click points to the starter. No sound at all may be a fuse, which costs very little "
    "and can be changed in a minute.",
    "In the evening the whole family sat around the table and played cards. Nobody was allowed to look at a "
    "telephone. My aunt won most of the games, and when she did not, she said that the cards had been badly "
    "mixed. At ten o'clock my mother brought out the cake that she had hidden, and for a while nobody spoke. I "
    "have been to better dinners since then, but to none that I remember so well.",
    "The moon pulls at the sea, and the sea rises towards it. On the far side of the earth the water rises as "
    "well, because there the pull is weakest and the water is left behind. As the earth turns, every coast passes "
    "through both of these hills of water, and so there are two high tides a day. The sun does the same, but less "
    "strongly, since it is so much farther away.",
)
